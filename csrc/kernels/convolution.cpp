#include "kernels/convolution.h"

#include <algorithm>

namespace innerloop::INNERLOOP_ISA {
namespace {

bool winograd_applies(const ConvolutionShape& s, int64_t vector) {
  return s.kernel_height == 3 && s.kernel_width == 3 && s.stride_height == 1 && s.stride_width == 1 &&
         s.padding_height <= 2 && s.padding_width <= 2 && s.channels % vector == 0 && s.outputs % vector == 0;
}

int64_t outputs_along(int64_t size, int64_t padding, int64_t kernel, int64_t stride) {
  return (size + 2 * padding - kernel) / stride + 1;
}

// The tile with the fewest multiplications per image, where it saves enough to pay for the transforms. A larger tile
// rounds more and transforms more: it must save an eighth.
int cheapest_tile(int64_t height, int64_t width, WinogradUse use) {
  const auto products = [&](int tile) { return winograd_tiles(tile, height, width) * winograd_points(tile); };
  int best = 2;
  for (int tile = 3; tile <= 4; ++tile) {
    if (8 * products(tile) < 7 * products(best)) best = tile;
  }
  const bool pays = std::min(height, width) >= 3 && 4 * products(best) < 3 * 9 * height * width;
  return pays || use == WinogradUse::forced ? best : 0;
}

// Large maps belong to deep sums over many pixels, where rounding in the forward pass flips ReLUs and maxima; there
// the most accurate tile is used.
constexpr int64_t large_map = 20 * 20;

}  // namespace

template <class T>
int winograd_tile(const ConvolutionShape& shape, WinogradUse use) {
  if (use == WinogradUse::off || !winograd_applies(shape, lanes<T>)) return 0;
  return cheapest_tile(outputs_along(shape.height, shape.padding_height, 3, 1),
                       outputs_along(shape.width, shape.padding_width, 3, 1), use);
}

template <class T>
Convolution<T>::Convolution(const ConvolutionShape& shape, WinogradUse winograd)
    : shape_(shape),
      output_height_(outputs_along(shape.height, shape.padding_height, shape.kernel_height, shape.stride_height)),
      output_width_(outputs_along(shape.width, shape.padding_width, shape.kernel_width, shape.stride_width)),
      gradient_halo_(0),
      tile_(winograd_tile<T>(shape, winograd)),
      forward_tile_(tile_ != 0 && output_height_ * output_width_ >= large_map ? 2 : tile_) {
  const int64_t pixels = output_height_ * output_width_;
  group_ = std::max<int64_t>(1, tile_ != 0 ? winograd_chunk(tile_, shape.channels, shape.outputs, sizeof(T)) * 5 / 4 /
                                                 winograd_tiles(tile_, output_height_, output_width_)
                                           : 400 / pixels);
  make_phases();
  make_offsets();
}

template <class T>
int64_t Convolution<T>::input_image() const {
  return (shape_.height + 2 * shape_.halo) * (shape_.width + 2 * shape_.halo) * shape_.channels;
}

template <class T>
int64_t Convolution<T>::output_image() const {
  return (output_height_ + 2 * shape_.output_halo) * (output_width_ + 2 * shape_.output_halo) * shape_.outputs;
}

template <class T>
int64_t Convolution<T>::gradient_image() const {
  return (output_height_ + 2 * gradient_halo_) * (output_width_ + 2 * gradient_halo_) * shape_.outputs;
}

template <class T>
void Convolution<T>::make_offsets() {
  const ConvolutionShape& s = shape_;
  patch_ = {.rows = output_height_ * output_width_,
            .segments = s.kernel_height,
            .segment_stride = (s.width + 2 * s.halo) * s.channels,
            .segment_length = s.kernel_width * s.channels,
            .columns = s.outputs};
  for (int64_t image = 0; image < group_; ++image) {
    for (int64_t y = 0; y < output_height_; ++y) {
      for (int64_t x = 0; x < output_width_; ++x) {
        const int64_t row = y * s.stride_height - s.padding_height + s.halo;
        const int64_t column = x * s.stride_width - s.padding_width + s.halo;
        const auto pixel = [&](int64_t halo) {
          return ((image * (output_height_ + 2 * halo) + y + halo) * (output_width_ + 2 * halo) + x + halo) * s.outputs;
        };
        x_offsets_.push_back(
            static_cast<int32_t>(image * input_image() + row * patch_.segment_stride + column * s.channels));
        y_offsets_.push_back(static_cast<int32_t>(pixel(s.output_halo)));
        dy_offsets_.push_back(static_cast<int32_t>(pixel(gradient_halo_)));
      }
    }
  }
}

// Row r of the input receives dy[o] · w[k] where o · stride + k = r + padding. Rows with the same (r + padding) mod
// stride are reached by the same k, from neighbouring o: for each such phase the gradient is a product of patches at
// stride 1, with the kernel reversed.
template <class T>
void Convolution<T>::make_phases() {
  struct Axis {
    int64_t first;              // input row
    int64_t count;              // of input rows, `stride` apart
    int64_t from;               // output row that the patch of the first one starts at (may be negative)
    std::vector<int64_t> taps;  // kernel rows, from large to small
  };
  const auto axes = [this](int64_t size, int64_t kernel, int64_t stride, int64_t padding, int64_t outputs) {
    std::vector<Axis> result;
    for (int64_t first = 0; first < std::min(stride, size); ++first) {
      Axis axis{first, (size - first + stride - 1) / stride, 0, {}};
      for (int64_t k = (first + padding) % stride; k < kernel; k += stride) axis.taps.insert(axis.taps.begin(), k);
      if (!axis.taps.empty()) {
        axis.from = (first + padding - axis.taps.front()) / stride;
        const int64_t beyond = axis.from + axis.count - 1 + static_cast<int64_t>(axis.taps.size()) - outputs;
        gradient_halo_ = std::max({gradient_halo_, -axis.from, beyond});
      }
      result.push_back(axis);
    }
    return result;
  };
  const ConvolutionShape& s = shape_;
  const auto rows = axes(s.height, s.kernel_height, s.stride_height, s.padding_height, output_height_);
  const auto columns = axes(s.width, s.kernel_width, s.stride_width, s.padding_width, output_width_);
  const int64_t gradient_row = (output_width_ + 2 * gradient_halo_) * s.outputs;
  int64_t weights = 0;
  for (const Axis& row : rows) {
    for (const Axis& column : columns) {
      Phase phase{};
      const auto taps = static_cast<int64_t>(row.taps.size() * column.taps.size());
      phase.patch = {.rows = row.count * column.count,
                     .segments = taps == 0 ? 0 : static_cast<int64_t>(row.taps.size()),
                     .segment_stride = gradient_row,
                     .segment_length = static_cast<int64_t>(column.taps.size()) * s.outputs,
                     .columns = s.channels};
      phase.weights = weights;
      for (const int64_t y : row.taps) {
        for (const int64_t x : column.taps) phase.taps.push_back(y * s.kernel_width + x);
      }
      for (int64_t image = 0; image < group_; ++image) {
        for (int64_t y = 0; y < row.count; ++y) {
          for (int64_t x = 0; x < column.count; ++x) {
            const int64_t from_row = taps == 0 ? 0 : row.from + y + gradient_halo_;
            const int64_t from_column = taps == 0 ? 0 : column.from + x + gradient_halo_;
            phase.from.push_back(
                static_cast<int32_t>(image * gradient_image() + from_row * gradient_row + from_column * s.outputs));
            const int64_t to_row = row.first + y * s.stride_height;
            const int64_t to_column = column.first + x * s.stride_width;
            phase.to.push_back(static_cast<int32_t>(((image * s.height + to_row) * s.width + to_column) * s.channels));
          }
        }
      }
      weights += taps * s.outputs * s.channels;
      phases_.push_back(std::move(phase));
    }
  }
}

template <class T>
int64_t Convolution<T>::weights_size() const {
  return shape_.kernel_height * shape_.kernel_width * shape_.channels * shape_.outputs;
}

template <class T>
int64_t Convolution<T>::transformed_size(int tile) const {
  return winograd_weights_size(tile, shape_.channels, shape_.outputs);
}

template <class T>
int64_t Convolution<T>::prepared_size() const {
  // The input gradient turns the kernel over before it transforms it.
  return weights_size() + (tile_ != 0 ? transformed_size(std::max(tile_, forward_tile_)) : 0);
}

template <class T>
int64_t Convolution<T>::scratch_size() const {
  if (tile_ == 0) return 0;
  const int64_t products = std::max(winograd_scratch<T>(tile_, shape_.channels, shape_.outputs),
                                    winograd_scratch<T>(forward_tile_, shape_.channels, shape_.outputs));
  return transformed_size(tile_) + std::max(products, winograd_scratch<T>(tile_, shape_.outputs, shape_.channels));
}

template <class T>
const T* Convolution<T>::prepare_forward(const T* w, T* space) const {
  if (forward_tile_ == 0) return w;
  winograd_weights(forward_tile_, shape_.channels, shape_.outputs, w, space);
  return space;
}

template <class T>
const T* Convolution<T>::prepare_tangent(const T* w, T* space) const {
  if (tile_ == 0) return w;
  winograd_weights(tile_, shape_.channels, shape_.outputs, w, space);
  return space;
}

template <class T>
const T* Convolution<T>::prepare_input_gradient(const T* w, T* space) const {
  const int64_t matrix = shape_.channels * shape_.outputs;
  for (const Phase& phase : phases_) {
    T* to = space + phase.weights;
    for (const int64_t tap : phase.taps) {
      transpose(shape_.channels, shape_.outputs, w + tap * matrix, shape_.outputs, to, shape_.channels);
      to += matrix;
    }
  }
  if (tile_ == 0) return space;
  T* transformed = space + weights_size();
  winograd_weights(tile_, shape_.outputs, shape_.channels, space, transformed);
  return transformed;
}

template <class T>
void Convolution<T>::forward(int64_t images, const T* x, const T* w, const T* bias, T* y, T* scratch) const {
  convolve(forward_tile_, images, {{x, w}}, bias, y, scratch);
}

template <class T>
void Convolution<T>::tangent(int64_t images, const Terms<T>& terms, const T* bias, T* y, T* scratch) const {
  convolve(tile_, images, terms, bias, y, scratch);
}

namespace {

// The terms, their a further on by `distance`.
template <class T>
Terms<T> advance(Terms<T> terms, int64_t distance) {
  terms.first.a += distance;
  if (terms.second.a != nullptr) terms.second.a += distance;
  return terms;
}

}  // namespace

template <class T>
void Convolution<T>::convolve(int tile, int64_t images, const Terms<T>& terms, const T* bias, T* y, T* scratch) const {
  const ConvolutionShape& s = shape_;
  const int64_t out_row = (output_width_ + 2 * s.output_halo) * s.outputs;
  if (tile != 0) {
    const WinogradShape winograd{.tile = tile,
                                 .images = images,
                                 .height = output_height_,
                                 .width = output_width_,
                                 .inputs = s.channels,
                                 .outputs = s.outputs,
                                 .input = {input_image(), patch_.segment_stride},
                                 .output = {output_image(), out_row}};
    winograd_convolve(winograd, advance(terms, x_offsets_.front()), bias, y + y_offsets_.front(),
                      scratch + transformed_size(tile_));
    return;
  }
  for (int64_t image = 0; image < images; image += group_) {
    PatchShape patch = patch_;
    patch.rows *= std::min(group_, images - image);
    multiply_patches(patch, advance(terms, image * input_image()), x_offsets_.data(), y_offsets_.data(), bias,
                     y + image * output_image());
  }
}

template <class T>
void Convolution<T>::input_gradient(int64_t images, const Terms<T>& terms, T* dx, T* scratch) const {
  const ConvolutionShape& s = shape_;
  if (tile_ != 0) {
    const Phase& phase = phases_.front();
    const WinogradShape winograd{.tile = tile_,
                                 .images = images,
                                 .height = s.height,
                                 .width = s.width,
                                 .inputs = s.outputs,
                                 .outputs = s.channels,
                                 .input = {gradient_image(), phase.patch.segment_stride},
                                 .output = {s.height * s.width * s.channels, s.width * s.channels}};
    winograd_convolve<T>(winograd, advance(terms, phase.from.front()), nullptr, dx, scratch + transformed_size(tile_));
    return;
  }
  for (int64_t image = 0; image < images; image += group_) {
    for (const Phase& phase : phases_) {
      PatchShape patch = phase.patch;
      patch.rows *= std::min(group_, images - image);
      Terms<T> part = advance(terms, image * gradient_image());
      part.first.b += phase.weights;
      if (part.second.a != nullptr) part.second.b += phase.weights;
      multiply_patches<T>(patch, part, phase.from.data(), phase.to.data(), nullptr,
                          dx + image * s.height * s.width * s.channels);
    }
  }
}

template <class T>
void Convolution<T>::start_weight_gradient(T* scratch) const {
  if (tile_ != 0) std::fill_n(scratch, transformed_size(tile_), T(0));
}

template <class T>
void Convolution<T>::add_weight_gradient(int64_t images, const T* x, const T* dy, T* gradient, T* scratch) const {
  const ConvolutionShape& s = shape_;
  if (tile_ != 0) {
    const WinogradShape winograd{.tile = tile_,
                                 .images = images,
                                 .height = output_height_,
                                 .width = output_width_,
                                 .inputs = s.channels,
                                 .outputs = s.outputs,
                                 .input = {input_image(), patch_.segment_stride},
                                 .output = {gradient_image(), (output_width_ + 2 * gradient_halo_) * s.outputs}};
    winograd_add_outer(winograd, x + x_offsets_.front(), dy + dy_offsets_.front(), scratch,
                       scratch + transformed_size(tile_));
    return;
  }
  for (int64_t image = 0; image < images; image += group_) {
    PatchShape patch = patch_;
    patch.rows *= std::min(group_, images - image);
    add_outer_patches(patch, x + image * input_image(), x_offsets_.data(), dy + image * gradient_image(),
                      dy_offsets_.data(), gradient);
  }
}

template <class T>
void Convolution<T>::finish_weight_gradient(T* gradient, T* scratch) const {
  if (tile_ != 0) winograd_add_gradient(tile_, shape_.channels, shape_.outputs, scratch, gradient);
}

template int winograd_tile<float>(const ConvolutionShape&, WinogradUse);
template int winograd_tile<double>(const ConvolutionShape&, WinogradUse);
template class Convolution<float>;
template class Convolution<double>;

}  // namespace innerloop::INNERLOOP_ISA
