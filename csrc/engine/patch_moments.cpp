#include "engine/patch_moments.h"

#include <algorithm>

#include "engine/layout.h"

namespace innerloop::INNERLOOP_ISA {

template <class T>
PatchMoments<T>::PatchMoments(const ConvolutionShape& shape)
    : shape_(shape),
      output_height_(shape.height + 2 * shape.padding_height - shape.kernel_height + 1),
      output_width_(shape.width + 2 * shape.padding_width - shape.kernel_width + 1),
      segment_(shape.kernel_width * shape.channels),
      size_(shape.kernel_height * segment_),
      columns_(round_up(size_, lanes<T>)),
      patch_row_(columns_ + lanes<T>),
      mean_(static_cast<size_t>(size_)),
      covariance_(static_cast<size_t>(size_ * size_)),
      shift_(static_cast<size_t>(shape.channels)),
      shifted_(static_cast<size_t>((shape.height + 2 * shape.halo) * (shape.width + 2 * shape.halo) * shape.channels +
                                   2 * lanes<T>)),
      patches_(static_cast<size_t>((output_width_ + 1) * patch_row_ + lanes<T>)),
      products_(static_cast<size_t>(size_ * columns_)),
      sums_(static_cast<size_t>(columns_)) {}

template <class T>
void PatchMoments<T>::compute(const T* x, int64_t images) {
  const int64_t pixels = (shape_.height + 2 * shape_.halo) * (shape_.width + 2 * shape_.halo);
  // Around 0, a mean far from it would drown the variance in rounding; around any value near the mean it does not.
  for (int64_t c = 0; c < shape_.channels; ++c) {
    double sum = 0;
    for (int64_t p = 0; p < pixels; ++p) sum += static_cast<double>(x[p * shape_.channels + c]);
    shift_[static_cast<size_t>(c)] = static_cast<T>(sum / static_cast<double>(shape_.height * shape_.width));
  }
  std::ranges::fill(mean_, 0.0);
  std::ranges::fill(covariance_, 0.0);
  for (int64_t image = 0; image < images; ++image) add_image(x + image * pixels * shape_.channels);

  count_ = static_cast<double>(images * output_height_ * output_width_);
  for (double& mean : mean_) mean /= count_;
  for (int64_t i = 0; i < size_; ++i) {
    for (int64_t j = 0; j < size_; ++j) {
      double& covariance = covariance_[static_cast<size_t>(i * size_ + j)];
      covariance = covariance / count_ - mean_[static_cast<size_t>(i)] * mean_[static_cast<size_t>(j)];
    }
  }
  for (int64_t i = 0; i < size_; ++i) {
    mean_[static_cast<size_t>(i)] += static_cast<double>(shift_[static_cast<size_t>(i % shape_.channels)]);
  }
}

// Adds one image's patches, and their products, to mean_ and covariance_; within the image in T.
template <class T>
void PatchMoments<T>::add_image(const T* x) {
  const int64_t row = (shape_.width + 2 * shape_.halo) * shape_.channels;
  const int64_t rows = shape_.height + 2 * shape_.halo;
  for (int64_t at = 0; at < rows * row; at += shape_.channels) {
    for (int64_t c = 0; c < shape_.channels; ++c) {
      shifted_[static_cast<size_t>(at + c)] = x[at + c] - shift_[static_cast<size_t>(c)];
    }
  }
  std::ranges::fill(products_, T(0));
  std::ranges::fill(sums_, T(0));
  const OuterShape outer{.points = output_width_,
                         .rows = size_,
                         .columns = columns_,
                         .a_row = patch_row_,
                         .b_row = patch_row_,
                         .out_row = columns_};
  for (int64_t y = 0; y < output_height_; ++y) {
    const T* from = shifted_.data() + (y - shape_.padding_height + shape_.halo) * row +
                    (shape_.halo - shape_.padding_width) * shape_.channels;
    // Whole vectors: each segment overwrites what the one before wrote beyond its end. What the last one leaves there
    // meets columns that nobody reads.
    for (int64_t segment = 0; segment < shape_.kernel_height; ++segment) {
      for (int64_t pixel = 0; pixel < output_width_; ++pixel) {
        for (int64_t k = 0; k < segment_; k += lanes<T>) {
          store(patches_.data() + pixel * patch_row_ + segment * segment_ + k,
                load(from + segment * row + pixel * shape_.channels + k));
        }
      }
    }
    add_outer(outer, patches_.data(), patches_.data(), products_.data());
    add_column_sums(output_width_, columns_, patches_.data(), patch_row_, sums_.data());
  }
  for (int64_t i = 0; i < size_; ++i) {
    mean_[static_cast<size_t>(i)] += static_cast<double>(sums_[static_cast<size_t>(i)]);
    for (int64_t j = 0; j < size_; ++j) {
      covariance_[static_cast<size_t>(i * size_ + j)] +=
          static_cast<double>(products_[static_cast<size_t>(i * columns_ + j)]);
    }
  }
}

template <class T>
void PatchMoments<T>::covariance_times(const T* w, int64_t channels, std::vector<double>& product) const {
  product.assign(static_cast<size_t>(size_ * channels), 0);
  for (int64_t i = 0; i < size_; ++i) {
    double* __restrict to = product.data() + i * channels;
    for (int64_t j = 0; j < size_; ++j) {
      const double covariance = covariance_[static_cast<size_t>(i * size_ + j)];
      const T* __restrict from = w + j * channels;
      for (int64_t c = 0; c < channels; ++c) to[c] += covariance * static_cast<double>(from[c]);
    }
  }
}

template class PatchMoments<float>;
template class PatchMoments<double>;

}  // namespace innerloop::INNERLOOP_ISA
