// Convolutions of channels-last images, and their derivatives.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels/gemm.h"
#include "kernels/winograd.h"

namespace innerloop::INNERLOOP_ISA {

struct ConvolutionShape {
  int64_t height;  // of the input images
  int64_t width;
  int64_t channels;  // distance between input pixels; whole vectors where input_gradient or Winograd's form is wanted
  int64_t halo;      // rows and columns of zeros around an input image in memory: at least the padding
  int64_t kernel_height;
  int64_t kernel_width;
  int64_t stride_height;
  int64_t stride_width;
  int64_t padding_height;
  int64_t padding_width;
  int64_t outputs;      // channels of an output pixel, whole vectors
  int64_t output_halo;  // around an output image in memory
};

// Where Winograd's form is used: nowhere, where it costs less, or wherever it applies (a 3×3 kernel at stride 1).
enum class WinogradUse : int8_t { off, automatic, forced };

// Winograd's tile for a convolution, but for the forward pass where that has one of its own; 0: the direct form.
template <class T>
int winograd_tile(const ConvolutionShape& shape, WinogradUse use);

// Memory: images [height + 2·halo][width + 2·halo][channels]; weights [kernel rows][kernel columns][channels][outputs].
// Every function takes any number of images; a caller that works on its images in groups of group() finds them, and
// what the convolution makes of them, in the second-level cache.
//
// Weights are prepared once for many images: each prepare_… returns what the product of the same name takes, either w
// itself or `space` [prepared_size()], filled. Scratch memory [scratch_size()] may be shared by convolutions, except
// between start_weight_gradient and finish_weight_gradient.
template <class T>
class Convolution {
 public:
  Convolution(const ConvolutionShape& shape, WinogradUse winograd);

  const ConvolutionShape& shape() const { return shape_; }
  int64_t output_height() const { return output_height_; }
  int64_t output_width() const { return output_width_; }
  // Zeros that must surround an image of dy in memory: dy [output height + 2·halo][output width + 2·halo][outputs].
  int64_t gradient_halo() const { return gradient_halo_; }
  int64_t group() const { return group_; }
  int64_t weights_size() const;
  int64_t prepared_size() const;
  int64_t scratch_size() const;
  // Winograd's tile for the forward pass and, of winograd_tile(), for everything else; 0: the direct form.
  int forward_tile() const { return forward_tile_; }
  int tile() const { return tile_; }

  // y = x ∗ w + bias.
  const T* prepare_forward(const T* w, T* space) const;
  void forward(int64_t images, const T* x, const T* w, const T* bias, T* y, T* scratch) const;

  // y = a ∗ b of one or two terms + bias: the tangent is x ∗ ẇ + ẋ ∗ w. Zeros of the output's halo are left alone.
  const T* prepare_tangent(const T* w, T* space) const;
  void tangent(int64_t images, const Terms<T>& terms, const T* bias, T* y, T* scratch) const;

  // dx (dense, without halo) = the sum of one or two terms {dy, prepared w}.
  const T* prepare_input_gradient(const T* w, T* space) const;
  void input_gradient(int64_t images, const Terms<T>& terms, T* dx, T* scratch) const;

  // gradient += the sum over all pairs (x, dy) that are added between start and finish.
  void start_weight_gradient(T* scratch) const;
  void add_weight_gradient(int64_t images, const T* x, const T* dy, T* gradient, T* scratch) const;
  void finish_weight_gradient(T* gradient, T* scratch) const;

 private:
  // Input pixels of one phase of the stride: those that the same rows and columns of the kernel reach.
  struct Phase {
    PatchShape patch;               // rows: those of one image
    int64_t weights;                // where its part of the prepared weights begins
    std::vector<int64_t> taps;      // kernel row · kernel width + kernel column, in the order of the gather
    std::vector<int32_t> from, to;  // offsets in dy and in dx, for a group of images
  };

  void make_offsets();
  void make_phases();
  int64_t input_image() const;
  int64_t output_image() const;
  int64_t gradient_image() const;
  int64_t transformed_size(int tile) const;
  void convolve(int tile, int64_t images, const Terms<T>& terms, const T* bias, T* y, T* scratch) const;

  ConvolutionShape shape_;
  int64_t output_height_;
  int64_t output_width_;
  int64_t gradient_halo_;
  int tile_;
  int forward_tile_;
  int64_t group_;
  PatchShape patch_;                            // of the forward product; rows: those of one image
  std::vector<int32_t> x_offsets_, y_offsets_;  // for a group of images
  std::vector<int32_t> dy_offsets_;
  std::vector<Phase> phases_;
};

}  // namespace innerloop::INNERLOOP_ISA
