// Register-blocked matrix products: what the layers stand on.
//
// Matrices are row-major. Columns of results (and of b) are whole vectors: a multiple of lanes<T>. Every form loads its
// sums once, keeps a tile of them in registers while it walks the inner dimension, and stores them once.
#pragma once

#include <cstdint>

#include "kernels/simd.h"

namespace innerloop::INNERLOOP_ISA {

// Rows a and the matrix b that they are multiplied by.
template <class T>
struct Term {
  const T* a = nullptr;
  const T* b = nullptr;
};

// A sum of one or two products of the same shape, such as the tangent x·ẇ + ẋ·w. A second term without a is absent.
template <class T>
struct Terms {
  Term<T> first;
  Term<T> second = {};
};

struct ProductShape {
  int64_t rows;
  int64_t inner;
  int64_t columns;
  int64_t a_row;        // distance between the rows of a
  int64_t a_inner = 1;  // distance between the elements of a row of a; rows of a transposed matrix have another
  int64_t b_row;        // distance between the rows of b
  int64_t out_row;      // distance between the rows of the result
};

// out[i][j] = bias[j] + Σ_terms Σ_r a[i·a_row + r·a_inner] · b[r·b_row + j]; without a bias: 0 + …
template <class T>
void multiply(const ProductShape& shape, const Terms<T>& terms, const T* bias, T* out);

// out[i][j] += the same sum.
template <class T>
void multiply_add(const ProductShape& shape, const Terms<T>& terms, T* out);

// Rows picked from an image: row i starts at a + a_offsets[i] and consists of several contiguous segments (one for each
// row of a convolution's kernel); its result goes to out + out_offsets[i].
struct PatchShape {
  int64_t rows;
  int64_t segments;
  int64_t segment_stride;  // distance between the segments of a row of a
  int64_t segment_length;
  int64_t columns;  // also the distance between the rows of b [segments · segment_length][columns]
};

template <class T>
void multiply_patches(const PatchShape& shape, const Terms<T>& terms, const int32_t* a_offsets,
                      const int32_t* out_offsets, const T* bias, T* out);

// out[k][j] += Σ_p a[p·a_row + k] · b[p·b_row + j]: the gradient of the weights of a product, p its rows.
struct OuterShape {
  int64_t points;
  int64_t rows;
  int64_t columns;
  int64_t a_row;
  int64_t b_row;
  int64_t out_row;
};

template <class T>
void add_outer(const OuterShape& shape, const T* a, const T* b, T* out);

// The same for rows picked from images: out[s·segment_length + k][j] += Σ_p a[a_offsets[p] + s·segment_stride + k] ·
// b[b_offsets[p] + j].
template <class T>
void add_outer_patches(const PatchShape& shape, const T* a, const int32_t* a_offsets, const T* b,
                       const int32_t* b_offsets, T* out);

// out[i][j] = add + Σ_r a[i][r] b[j][r]: few results of long rows, such as a Gram matrix. No size need be padded.
template <class T>
void multiply_rows(int64_t a_rows, int64_t b_rows, int64_t inner, const T* a, int64_t a_row, const T* b, int64_t b_row,
                   T add, T* out, int64_t out_row);

// out[j][i] = in[i][j] for rows × columns of in.
template <class T>
void transpose(int64_t rows, int64_t columns, const T* in, int64_t in_row, T* out, int64_t out_row);

// sums[j] += Σ_i a[i·a_row + j]; columns are whole vectors.
template <class T>
void add_column_sums(int64_t rows, int64_t columns, const T* a, int64_t a_row, T* sums);

}  // namespace innerloop::INNERLOOP_ISA
