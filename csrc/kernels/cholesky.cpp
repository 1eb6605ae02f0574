#include "kernels/cholesky.h"

#include <cmath>
#include <limits>

namespace innerloop::INNERLOOP_ISA {
namespace {

// to −= factor · from
inline void subtract(double* __restrict to, const double* __restrict from, double factor, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] -= factor * from[i];
}

}  // namespace

int64_t cholesky(double* matrix, int64_t n) {
  const double rounding = static_cast<double>(n) * std::numeric_limits<double>::epsilon();
  for (int64_t k = 0; k < n; ++k) {
    double* row = matrix + k * n;
    double subtracted = 0;
    for (int64_t i = 0; i < k; ++i) subtracted += matrix[i * n + k] * matrix[i * n + k];
    // What is left of the diagonal must be more than rounding left there; comparisons with NaN are false.
    if (!(row[k] > rounding * (row[k] + subtracted)) || !std::isfinite(row[k])) return k;
    const double scale = 1 / std::sqrt(row[k]);
    for (int64_t j = k; j < n; ++j) row[j] *= scale;
    for (int64_t i = k + 1; i < n; ++i) subtract(matrix + i * n + i, row + i, row[i], n - i);
  }
  return n;
}

void cholesky_solve(const double* u, int64_t n, double* right, int64_t columns) {
  for (int64_t k = 0; k < n; ++k) {
    double* row = right + k * columns;
    for (int64_t j = 0; j < columns; ++j) row[j] /= u[k * n + k];
    for (int64_t i = k + 1; i < n; ++i) subtract(right + i * columns, row, u[k * n + i], columns);
  }
  for (int64_t k = n - 1; k >= 0; --k) {
    double* row = right + k * columns;
    for (int64_t i = k + 1; i < n; ++i) subtract(row, right + i * columns, u[k * n + i], columns);
    for (int64_t j = 0; j < columns; ++j) row[j] /= u[k * n + k];
  }
}

}  // namespace innerloop::INNERLOOP_ISA
