// Factors of symmetric matrices of doubles, and solutions with them, by the threads of a block together, of which there
// are whole warps.
#pragma once

#include <cmath>
#include <limits>

#include "cuda/block.h"
#include "cuda/launch.h"

namespace innerloop {

constexpr double epsilon = std::numeric_limits<double>::epsilon();

// Of matrices [count, n, n] the upper triangles become U, UᵀU = the matrix, but for the diagonals: what 1 is over those
// goes to inverses [count, n]. Below, nothing is read or written. Returns n, or the first row where one of the matrices
// is not positive definite to within rounding.
__device__ inline int64_t cholesky(double* matrices, double* inverses, int64_t count, int64_t n) {
  const double rounding = static_cast<double>(n) * epsilon;
  by_block(count * n, [&](int64_t e) { inverses[e] = matrices[e * n + e % n]; });  // at first the diagonals themselves
  for (int64_t k = 0; k < n; ++k) {
    // What is left of the diagonal must be more than rounding left there; comparisons with NaN are false.
    for (int64_t m = 0; m < count; ++m) {
      const double pivot = matrices[(m * n + k) * n + k];
      if (!(pivot > rounding * inverses[m * n + k]) || !(pivot < infinity<double>)) return k;
    }
    const int64_t left = n - k - 1;
    by_block(count * left, [&](int64_t e) {
      double* row = matrices + (e / left * n + k) * n;
      row[k + 1 + e % left] /= std::sqrt(row[k]);
    });
    // A warp for each row, its lanes along the row.
    for (int64_t e = threadIdx.x / 32; e < count * left; e += blockDim.x / 32) {
      const double* row = matrices + (e / left * n + k) * n;
      const int64_t i = k + 1 + e % left;
      double* to = matrices + (e / left * n + i) * n;
      for (int64_t j = i + threadIdx.x % 32; j < n; j += 32) to[j] -= row[i] * row[j];
    }
    by_block(count, [&](int64_t m) { inverses[m * n + k] = 1 / std::sqrt(matrices[(m * n + k) * n + k]); });
  }
  return n;
}

// x [count, n, columns] becomes the solutions (UᵀU)⁻¹ x with each matrix's factor.
__device__ inline void cholesky_solve(const double* factors, const double* inverses, int64_t count, int64_t n,
                                      double* x, int64_t columns) {
  const auto scale = [&] { by_block(count * n * columns, [&](int64_t e) { x[e] *= inverses[e / columns]; }); };
  for (int64_t k = 0; k < n; ++k) {
    const int64_t below = (n - k - 1) * columns;
    by_block(count * below, [&](int64_t e) {
      const int64_t m = e / below, i = k + 1 + e % below / columns, j = e % columns;
      x[(m * n + i) * columns + j] -=
          factors[(m * n + k) * n + i] * (x[(m * n + k) * columns + j] * inverses[m * n + k]);
    });
  }
  scale();
  for (int64_t k = n - 1; k >= 0; --k) {
    const int64_t above = k * columns;
    by_block(count * above, [&](int64_t e) {
      const int64_t m = e / above, i = e % above / columns, j = e % columns;
      x[(m * n + i) * columns + j] -=
          factors[(m * n + i) * n + k] * (x[(m * n + k) * columns + j] * inverses[m * n + k]);
    });
  }
  scale();
}

}  // namespace innerloop
