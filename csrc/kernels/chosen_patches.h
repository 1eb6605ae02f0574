// Products with the 3×3 patches that a 2×2 max-pooling chose.
//
// Every channel of an output has its own choice among four neighbouring patches, so a product over the taps of a patch
// needs another input value in each lane. The four patches together are a 4×4 window of the image: small enough, for
// one or three channels, to be held in registers as tables that one permutation a tap looks up. AVX-512 has it.
#pragma once

#include <cstdint>

#include "kernels/simd.h"

namespace innerloop::INNERLOOP_ISA {

#if defined(__AVX512F__)
constexpr bool has_table_lookup = true;
#else
constexpr bool has_table_lookup = false;
#endif

struct ChosenShape {
  int64_t height;    // of the outputs of an image
  int64_t width;     //
  int64_t channels;  // of an output; whole vectors
  int64_t pixel;     // channels of the input image: 1 or 3
  int64_t x_row;     // distance between rows of the input image
};

// x is the upper left corner of the patch of the first window's first element; choice [height][width][channels] is row
// · 2 + column of the chosen patch, negative: the output has no part in the sum.
//
// patches [9 · pixel][channels] += Σ_outputs (chosen patch) dy, sums [channels] += Σ_outputs dy.
void add_chosen_patches(const ChosenShape& shape, const float* x, const int32_t* choice, const float* dy,
                        float* patches, float* sums);

// z [width][channels] = (chosen patch) · w [9 · pixel][channels] for one row of outputs; x is that of its first window.
void multiply_chosen_patches(const ChosenShape& shape, const float* x, const int32_t* choice, const float* w, float* z);

}  // namespace innerloop::INNERLOOP_ISA
