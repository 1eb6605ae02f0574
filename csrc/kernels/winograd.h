// Winograd's minimal filtering F(M×M, 3×3): a 3×3 convolution at stride 1 as (M+2)² matrix products, one for each
// point of a transform domain, instead of 9M².
//
//     y = Aᵀ [ (G w Gᵀ) ⊙ (Bᵀ x B) ] A        (Lavin & Gray 2016)
//
// for tiles of M × M outputs, ⊙ a matrix product over the channels. Its derivative by the weights is
// Gᵀ [ (Bᵀ x B) ⊙ (A dy Aᵀ) ] G. What is paid for it: rounding. In float32, normal data and 64 channels, the root mean
// square error relative to the result is 2.6e-7 for M = 2, 6.4e-7 for M = 3 and 7.6e-7 for M = 4 (the gradient's:
// 4e-7, 1.1e-6, 1.2e-6).
#pragma once

#include "kernels/gemm.h"

namespace innerloop::INNERLOOP_ISA {

// Distances, in elements, between the images of a group in memory and between the rows of an image.
struct ImageLayout {
  int64_t image;
  int64_t row;
};

struct WinogradShape {
  int tile;           // M: 2, 3 or 4
  int64_t images;     // of this call
  int64_t height;     // of the output; the input that is read has 2 rows and 2 columns more
  int64_t width;      //
  int64_t inputs;     // channels of an input pixel, whole vectors
  int64_t outputs;    // channels of an output pixel, whole vectors
  ImageLayout input;  // how the input lies in memory
  ImageLayout output;
};

// Points of the transform domain.
constexpr int64_t winograd_points(int tile) {
  return int64_t{tile + 2} * (tile + 2);
}

// Distance between the matrices [rows][columns] of two points. A transform reads or writes one vector of all points at
// a time: at a power of two they would compete for the same lines of the cache (small products run at half the speed).
constexpr int64_t winograd_stride(int64_t rows, int64_t columns) {
  return rows * columns + 16;
}

// Tiles that cover one image of outputs.
constexpr int64_t winograd_tiles(int tile, int64_t height, int64_t width) {
  return ((height + tile - 1) / tile) * ((width + tile - 1) / tile);
}

// Tiles worked on together, so that their transforms stay in the second-level cache.
int64_t winograd_chunk(int tile, int64_t inputs, int64_t outputs, int64_t element_bytes);

// Elements of scratch memory that the products below need, for one or two terms.
template <class T>
int64_t winograd_scratch(int tile, int64_t inputs, int64_t outputs);

// Elements of transformed weights: a matrix [inputs][outputs] for each point.
constexpr int64_t winograd_weights_size(int tile, int64_t inputs, int64_t outputs) {
  return winograd_points(tile) * winograd_stride(inputs, outputs);
}

// transformed = G w Gᵀ for weights [3][3][inputs][outputs].
template <class T>
void winograd_weights(int tile, int64_t inputs, int64_t outputs, const T* w, T* transformed);

// gradient [3][3][inputs][outputs] += Gᵀ u G for the sum u that winograd_add_outer makes.
template <class T>
void winograd_add_gradient(int tile, int64_t inputs, int64_t outputs, const T* u, T* gradient);

// y = bias + Σ_terms x ∗ w: a of a term is the input pixel at the first output's upper left corner, b the transformed
// weights; the bias may be null.
template <class T>
void winograd_convolve(const WinogradShape& shape, const Terms<T>& terms, const T* bias, T* y, T* scratch);

// u += (Bᵀ x B) ⊙ (A dy Aᵀ), summed over tiles, laid out as transformed weights are; dy lies as shape.output says.
template <class T>
void winograd_add_outer(const WinogradShape& shape, const T* x, const T* dy, T* u, T* scratch);

}  // namespace innerloop::INNERLOOP_ISA
