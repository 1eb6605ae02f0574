// Mean and covariance of the patches that a convolution reads.
//
// A convolution is linear in its patches x_p (all kernel positions and channels of one output pixel), so what BatchNorm
// needs of its output z_p = wᵀx_p + b over all pixels p follows from the patches' moments, whatever the weights are:
// mean(z) = wᵀμ + b, var(z) = wᵀΣw, mean of x_p (z_p − mean(z)) = Σw.
#pragma once

#include <vector>

#include "kernels/convolution.h"

namespace innerloop::INNERLOOP_ISA {

template <class T>
class PatchMoments {
 public:
  // Of a convolution at stride 1.
  explicit PatchMoments(const ConvolutionShape& shape);

  void compute(const T* x, int64_t images);

  int64_t size() const { return size_; }  // elements of a patch
  double count() const { return count_; }
  double mean(int64_t element) const { return mean_[static_cast<size_t>(element)]; }
  // product [size][channels] = Σ w for weights [size][channels].
  void covariance_times(const T* w, int64_t channels, std::vector<double>& product) const;

 private:
  void add_image(const T* x);

  ConvolutionShape shape_;
  int64_t output_height_, output_width_;
  int64_t segment_;    // elements of a patch that are contiguous in memory
  int64_t size_;       //
  int64_t columns_;    // size_ in whole vectors
  int64_t patch_row_;  // distance between patches of `patches_`
  double count_ = 0;
  std::vector<double> mean_, covariance_;
  std::vector<T> shift_;    // by channel: a provisional mean
  std::vector<T> shifted_;  // an image minus shift_, halo included
  std::vector<T> patches_;  // of one row of outputs
  std::vector<T> products_, sums_;
};

}  // namespace innerloop::INNERLOOP_ISA
