#include "kernels/distance.h"

#include <algorithm>

#include "kernels/simd.h"

namespace innerloop::INNERLOOP_ISA {
namespace {

// A tile of R rows × P points keeps its R·P sums in registers while it walks the dimensions once.
template <class T, int R, int P>
void distance_tile(const T* a, const T* b, int64_t points, int64_t dim, T* out) {
  constexpr int L = lanes<T>;
  Vector<T> sums[R][P] = {};
  int64_t d = 0;
  for (; d + L <= dim; d += L) {
    Vector<T> row[R];
    for (int i = 0; i < R; ++i) row[i] = load(a + i * dim + d);
    for (int j = 0; j < P; ++j) {
      const Vector<T> point = load(b + j * dim + d);
      for (int i = 0; i < R; ++i) {
        const Vector<T> difference = row[i] - point;
        sums[i][j] += difference * difference;
      }
    }
  }
  if (d < dim) {
    for (int j = 0; j < P; ++j) {
      const Vector<T> point = load_part(b + j * dim + d, dim - d);
      for (int i = 0; i < R; ++i) {
        const Vector<T> difference = load_part(a + i * dim + d, dim - d) - point;
        sums[i][j] += difference * difference;
      }
    }
  }
  for (int i = 0; i < R; ++i) {
    for (int j = 0; j < P; ++j) out[i * points + j] = sum<T>(sums[i][j]);
  }
}

template <class T, int R>
void distance_rows(const T* a, const T* b, int64_t points, int64_t dim, T* out) {
  int64_t j = 0;
  for (; j + 4 <= points; j += 4) distance_tile<T, R, 4>(a, b + j * dim, points, dim, out + j);
  for (; j < points; ++j) distance_tile<T, R, 1>(a, b + j * dim, points, dim, out + j);
}

template <class T>
void distances(const T* a, const T* b, int64_t rows, int64_t points, int64_t dim, T* out) {
  int64_t i = 0;
  for (; i + 4 <= rows; i += 4) distance_rows<T, 4>(a + i * dim, b, points, dim, out + i * points);
  for (; i < rows; ++i) distance_rows<T, 1>(a + i * dim, b, points, dim, out + i * points);
}

// out[i] = 2 (a[i] Σⱼ g[i,j] − Σⱼ g[i,j] b[j]) for R rows and V vectors of the dimensions from d on.
template <class T, int R, int V>
void backward_tile(const T* gradient, int64_t row_stride, int64_t point_stride, const T* a, const T* b, int64_t points,
                   int64_t dim, T* out) {
  constexpr int L = lanes<T>;
  Vector<T> sums[R][V] = {};
  T totals[R] = {};
  for (int64_t j = 0; j < points; ++j) {
    Vector<T> point[V];
    for (int v = 0; v < V; ++v) point[v] = load(b + j * dim + v * L);
    for (int i = 0; i < R; ++i) {
      const T weight = gradient[i * row_stride + j * point_stride];
      totals[i] += weight;
      for (int v = 0; v < V; ++v) sums[i][v] += weight * point[v];
    }
  }
  for (int i = 0; i < R; ++i) {
    for (int v = 0; v < V; ++v) {
      store(out + i * dim + v * L, 2 * (totals[i] * load(a + i * dim + v * L) - sums[i][v]));
    }
  }
}

template <class T, int R>
void backward_rows(const T* gradient, int64_t row_stride, int64_t point_stride, const T* a, const T* b, int64_t points,
                   int64_t dim, T* out) {
  constexpr int L = lanes<T>;
  int64_t d = 0;
  for (; d + 4 * L <= dim; d += 4 * L) {
    backward_tile<T, R, 4>(gradient, row_stride, point_stride, a + d, b + d, points, dim, out + d);
  }
  for (; d + L <= dim; d += L) {
    backward_tile<T, R, 1>(gradient, row_stride, point_stride, a + d, b + d, points, dim, out + d);
  }
  for (int i = 0; i < R; ++i) {
    for (int64_t e = d; e < dim; ++e) {
      T total = 0;
      for (int64_t j = 0; j < points; ++j) {
        total += gradient[i * row_stride + j * point_stride] * (a[i * dim + e] - b[j * dim + e]);
      }
      out[i * dim + e] = 2 * total;
    }
  }
}

template <class T>
void backward(const T* gradient, int64_t row_stride, int64_t point_stride, const T* a, const T* b, int64_t rows,
              int64_t points, int64_t dim, T* out) {
  int64_t i = 0;
  for (; i + 4 <= rows; i += 4) {
    backward_rows<T, 4>(gradient + i * row_stride, row_stride, point_stride, a + i * dim, b, points, dim,
                        out + i * dim);
  }
  for (; i < rows; ++i) {
    backward_rows<T, 1>(gradient + i * row_stride, row_stride, point_stride, a + i * dim, b, points, dim,
                        out + i * dim);
  }
}

}  // namespace

void squared_distances(const float* a, const float* b, int64_t rows, int64_t points, int64_t dim, float* out) {
  distances(a, b, rows, points, dim, out);
}

void squared_distances(const double* a, const double* b, int64_t rows, int64_t points, int64_t dim, double* out) {
  distances(a, b, rows, points, dim, out);
}

void squared_distances_backward(const float* gradient, int64_t row_stride, int64_t point_stride, const float* a,
                                const float* b, int64_t rows, int64_t points, int64_t dim, float* out) {
  backward(gradient, row_stride, point_stride, a, b, rows, points, dim, out);
}

void squared_distances_backward(const double* gradient, int64_t row_stride, int64_t point_stride, const double* a,
                                const double* b, int64_t rows, int64_t points, int64_t dim, double* out) {
  backward(gradient, row_stride, point_stride, a, b, rows, points, dim, out);
}

}  // namespace innerloop::INNERLOOP_ISA
