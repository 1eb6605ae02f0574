#include <algorithm>
#include <array>
#include <utility>
#include <vector>

#include "kernels/distance.h"
#include "kernels/tiles.h"

namespace innerloop::INNERLOOP_ISA {
namespace {

constexpr int gradient_rows(int vectors) {
  if (vector_registers == 32) return 14;
  return vectors == 2 ? 6 : 12;
}

// A factor of each pair of rows: element (i, j) is weights[i·row + j·inner].
template <class T>
struct Weights {
  const T* values;
  int64_t row, inner;
};

// sums[i] = Σⱼ w(i,j) b[j] for R rows and V vectors; then finish(i, v, sums[i][v]).
template <class T, int R, int V, class Finish>
inline void weighted_sums(Weights<T> w, int64_t inner, const T* b, int64_t b_row, const Finish& finish) {
  constexpr int L = lanes<T>;
  Vector<T> sums[R][V] = {};
  const T* weight = w.values;
  for (int64_t j = 0; j < inner; ++j, b += b_row, weight += w.inner) {
    Vector<T> row_of_b[V];
    INNERLOOP_UNROLL
    for (int v = 0; v < V; ++v) row_of_b[v] = load(b + v * L);
    INNERLOOP_UNROLL
    for (int i = 0; i < R; ++i) {
      const Vector<T> factor = broadcast(weight[i * w.row]);
      INNERLOOP_UNROLL
      for (int v = 0; v < V; ++v) sums[i][v] += factor * row_of_b[v];
    }
  }
  INNERLOOP_UNROLL
  for (int i = 0; i < R; ++i) {
    INNERLOOP_UNROLL
    for (int v = 0; v < V; ++v) finish(i, v, sums[i][v]);
  }
}

// out[i] = scale · (totals[i] a[i] − Σⱼ w(i,j) b[j])
template <class T, int R, int V>
[[gnu::noinline]] void row_gradient_tile(Weights<T> w, int64_t inner, const T* b, int64_t b_row, const T* totals,
                                         T scale, const T* a, int64_t a_row, T* out, int64_t out_row) {
  weighted_sums<T, R, V>(w, inner, b, b_row, [&](int i, int v, Vector<T> sum) {
    const int64_t at = v * lanes<T>;
    store(out + i * out_row + at, scale * (totals[i] * load(a + i * a_row + at) - sum));
  });
}

// out[i] += Σⱼ w(i,j) b[j]
template <class T, int R, int V>
[[gnu::noinline]] void point_sum_tile(Weights<T> w, int64_t inner, const T* b, int64_t b_row, T* out, int64_t out_row) {
  weighted_sums<T, R, V>(w, inner, b, b_row, [&](int i, int v, Vector<T> sum) {
    T* to = out + i * out_row + v * lanes<T>;
    store(to, load(to) + sum);
  });
}

template <class T, int V, int... I>
constexpr auto row_gradient_tiles(std::integer_sequence<int, I...>) {
  return std::array{&row_gradient_tile<T, I + 1, V>...};
}

template <class T, int V, int... I>
constexpr auto point_sum_tiles(std::integer_sequence<int, I...>) {
  return std::array{&point_sum_tile<T, I + 1, V>...};
}

constexpr int64_t gradient_row_block = 64;

// The columns of one work item, whole vectors of them: in place, or a copy filled up with zeros.
template <class T>
class Columns {
 public:
  Columns(const T* from, int64_t rows, int64_t dim, int64_t columns) : values(from), row(dim) {
    if (columns % lanes<T> == 0) return;
    row = vectors_of<T>(columns) * lanes<T>;
    copy_.resize(static_cast<size_t>(rows * row));
    for (int64_t i = 0; i < rows; ++i) std::copy(from + i * dim, from + i * dim + columns, copy_.data() + i * row);
    values = copy_.data();
  }

  const T* values;
  int64_t row;

 private:
  std::vector<T> copy_;
};

// Adds the row to sums, and returns its total.
template <class T>
T add_and_total(const T* row, int64_t count, T* sums) {
  constexpr int L = lanes<T>;
  Vector<T> totals{};
  int64_t j = 0;
  for (; j + L <= count; j += L) {
    totals += load(row + j);
    store(sums + j, load(sums + j) + load(row + j));
  }
  T total = sum<T>(totals);
  for (; j < count; ++j) {
    total += row[j];
    sums[j] += row[j];
  }
  return total;
}

template <class T>
void backward(const T* g, T scale, const T* a, const T* b, int64_t rows, int64_t points, int64_t dim, int64_t first,
              int64_t last, T* to_a, T* to_b) {
  const int64_t columns = last - first, width = vectors_of<T>(columns) * lanes<T>;
  const bool whole = width == columns;
  const Columns<T> of_b(b + first, points, dim, columns);
  std::vector<T> sums(static_cast<size_t>(points * width)), of_points(static_cast<size_t>(points));
  std::vector<T> padded(whole ? 0 : static_cast<size_t>(gradient_row_block * width));
  T of_rows[gradient_row_block];
  for (int64_t i = 0; i < rows; i += gradient_row_block) {
    const int64_t count = std::min(gradient_row_block, rows - i);
    const T* weights = g + i * points;
    for (int64_t r = 0; r < count; ++r) of_rows[r] = add_and_total(weights + r * points, points, of_points.data());
    const Columns<T> of_a(a + i * dim + first, count, dim, columns);
    T* to = whole ? to_a + i * dim + first : padded.data();
    const int64_t to_row = whole ? dim : width;
    const auto strips = [&](auto vectors, int64_t begin, int64_t end) {
      constexpr int V = decltype(vectors)::value, R = gradient_rows(V), W = V * lanes<T>;
      static constexpr auto row_tiles = row_gradient_tiles<T, V>(std::make_integer_sequence<int, R>());
      static constexpr auto point_tiles = point_sum_tiles<T, V>(std::make_integer_sequence<int, R>());
      in_tiles<R>(count, [&](int64_t r, int64_t height) {
        const auto tile = row_tiles[static_cast<size_t>(height - 1)];
        for (int64_t j = begin; j < end; j += W) {
          tile({weights + r * points, points, 1}, points, of_b.values + j, of_b.row, of_rows + r, scale,
               of_a.values + r * of_a.row + j, of_a.row, to + r * to_row + j, to_row);
        }
      });
      in_tiles<R>(points, [&](int64_t p, int64_t height) {
        const auto tile = point_tiles[static_cast<size_t>(height - 1)];
        for (int64_t j = begin; j < end; j += W) {
          tile({weights + p, 1, points}, count, of_a.values + j, of_a.row, sums.data() + p * width + j, width);
        }
      });
    };
    const int64_t pairs = width - width % (2 * lanes<T>);
    strips(std::integral_constant<int, 2>(), 0, pairs);
    if (pairs < width) strips(std::integral_constant<int, 1>(), pairs, width);
    if (whole) continue;
    for (int64_t r = 0; r < count; ++r) {
      std::copy(to + r * width, to + r * width + columns, to_a + (i + r) * dim + first);
    }
  }
  for (int64_t p = 0; p < points; ++p) {
    for (int64_t j = 0; j < columns; ++j) {
      const T sum = sums[static_cast<size_t>(p * width + j)];
      to_b[p * dim + first + j] = scale * (of_points[static_cast<size_t>(p)] * b[p * dim + first + j] - sum);
    }
  }
}

}  // namespace

void squared_distances_backward(const float* g, float scale, const float* a, const float* b, int64_t rows,
                                int64_t points, int64_t dim, int64_t first, int64_t last, float* to_a, float* to_b) {
  backward(g, 2 * scale, a, b, rows, points, dim, first, last, to_a, to_b);
}

void squared_distances_backward(const double* g, double scale, const double* a, const double* b, int64_t rows,
                                int64_t points, int64_t dim, int64_t first, int64_t last, double* to_a, double* to_b) {
  backward(g, 2 * scale, a, b, rows, points, dim, first, last, to_a, to_b);
}

}  // namespace innerloop::INNERLOOP_ISA
