#include <algorithm>
#include <array>
#include <type_traits>
#include <utility>
#include <vector>

#include "kernels/distance.h"
#include "kernels/nontemporal.h"
#include "kernels/tiles.h"

namespace innerloop::INNERLOOP_ISA {
namespace {

// Rows and vectors of a tile: values and gradients of its rows, a vector of points and two of sums fill the registers.
constexpr int tile_rows = 6;
constexpr int tile_vectors = vector_registers == 32 ? 2 : 1;

template <class T>
struct Rows {
  T* data;
  int64_t row;  // distance between the rows

  Rows at(int64_t i, int64_t j) const { return {data + i * row + j, row}; }
};

// For R rows and V vectors, in one pass over a, given totals[i] = Σⱼ w[i,j]:
//   to_a[i] = scale · (totals[i] a[i] − Σⱼ w[i,j] b[j]),   sums[j] += Σᵢ w[i,j] a[i].
template <class T, int R, int V, Store kind>
[[gnu::noinline]] void gradient_tile(int64_t points, const T* w, const T* totals, T scale, Rows<const T> a,
                                     Rows<const T> b, Rows<T> to_a, Rows<T> sums) {
  constexpr int L = lanes<T>;
  Vector<T> of_a[R][V], to[R][V];
  INNERLOOP_UNROLL
  for (int i = 0; i < R; ++i) {
    const Vector<T> total = broadcast(totals[i]);
    INNERLOOP_UNROLL
    for (int v = 0; v < V; ++v) {
      of_a[i][v] = load(a.data + i * a.row + v * L);
      to[i][v] = total * of_a[i][v];
      // The next tile's rows and this tile's results: rows far apart, which no processor foresees.
      __builtin_prefetch(a.data + (i + R) * a.row + v * L, 0, 2);
      if constexpr (kind == Store::cached) __builtin_prefetch(to_a.data + i * to_a.row + v * L, 1);
    }
  }
  for (int64_t j = 0; j < points; ++j) {
    Vector<T> of_b[V], parts[2][V] = {};  // two sums: additions need not wait for one another
    INNERLOOP_UNROLL
    for (int v = 0; v < V; ++v) of_b[v] = load(b.data + j * b.row + v * L);
    INNERLOOP_UNROLL
    for (int i = 0; i < R; ++i) {
      const Vector<T> weight = broadcast(w[i * points + j]);
      INNERLOOP_UNROLL
      for (int v = 0; v < V; ++v) {
        to[i][v] -= weight * of_b[v];
        parts[i % 2][v] += weight * of_a[i][v];
      }
    }
    INNERLOOP_UNROLL
    for (int v = 0; v < V; ++v) {
      T* sum = sums.data + j * sums.row + v * L;
      store(sum, load(sum) + (parts[0][v] + parts[1][v]));
    }
  }
  INNERLOOP_UNROLL
  for (int i = 0; i < R; ++i) {
    INNERLOOP_UNROLL
    for (int v = 0; v < V; ++v) store<kind>(to_a.data + i * to_a.row + v * L, scale * to[i][v]);
  }
}

// The tiles of 1 … tile_rows rows.
template <class T, int V, Store kind, int... I>
constexpr auto gradient_tiles(std::integer_sequence<int, I...>) {
  return std::array{&gradient_tile<T, I + 1, V, kind>...};
}

// What the tiles of one work item take: rows of whole vectors.
template <class T>
struct Operands {
  const T *weights, *totals;
  T scale;
  Rows<const T> a, b;
  Rows<T> to_a, sums;
};

// Of points and their sums, so many bytes of columns stay in the nearer caches while all rows pass.
constexpr int64_t cached_bytes = 65536;

template <Store kind, class T>
void gradients(const Operands<T>& of, int64_t rows, int64_t points, int64_t width) {
  constexpr int64_t wide = tile_vectors * lanes<T>;
  const int64_t column_bytes = 2 * std::max<int64_t>(points, 1) * static_cast<int64_t>(sizeof(T));
  const int64_t part = std::max<int64_t>(cached_bytes / column_bytes / wide, 1) * wide;
  for (int64_t begin = 0; begin < width; begin += part) {
    const int64_t end = std::min(begin + part, width), narrow = end - (end - begin) % wide;
    in_tiles<tile_rows>(rows, [&](int64_t r, int64_t height) {
      const auto strip = [&](auto vectors, int64_t from, int64_t to) {
        constexpr int V = decltype(vectors)::value;
        static constexpr auto tiles = gradient_tiles<T, V, kind>(std::make_integer_sequence<int, tile_rows>());
        const auto tile = tiles[static_cast<size_t>(height - 1)];
        for (int64_t j = from; j < to; j += V * lanes<T>) {
          tile(points, of.weights + r * points, of.totals + r, of.scale, of.a.at(r, j), of.b.at(0, j), of.to_a.at(r, j),
               of.sums.at(0, j));
        }
      };
      strip(std::integral_constant<int, tile_vectors>(), begin, narrow);
      strip(std::integral_constant<int, 1>(), narrow, end);
    });
  }
  if constexpr (kind == Store::nontemporal) finish_stores();
}

// The columns of one work item, whole vectors of them: in place, or a copy filled up with zeros.
template <class T>
class Columns {
 public:
  Columns(const T* from, int64_t rows, int64_t dim, int64_t columns) : values{from, dim} {
    if (columns % lanes<T> == 0) return;
    values.row = vectors_of<T>(columns) * lanes<T>;
    copy_.resize(static_cast<size_t>(rows * values.row));
    for (int64_t i = 0; i < rows; ++i) {
      std::copy(from + i * dim, from + i * dim + columns, copy_.data() + i * values.row);
    }
    values.data = copy_.data();
  }

  Rows<const T> values;

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
              int64_t last, bool nontemporal, T* to_a, T* to_b) {
  const int64_t columns = last - first, width = vectors_of<T>(columns) * lanes<T>;
  const bool whole = width == columns;
  std::vector<T> of_rows(static_cast<size_t>(rows)), of_points(static_cast<size_t>(points));
  for (int64_t r = 0; r < rows; ++r) {
    of_rows[static_cast<size_t>(r)] = add_and_total(g + r * points, points, of_points.data());
  }
  const Columns<T> of_a(a + first, rows, dim, columns), of_b(b + first, points, dim, columns);
  std::vector<T> sums(static_cast<size_t>(points * width)), padded(whole ? 0 : static_cast<size_t>(rows * width));
  const Rows<T> to = whole ? Rows<T>{to_a + first, dim} : Rows<T>{padded.data(), width};
  const Operands<T> operands{g, of_rows.data(), scale, of_a.values, of_b.values, to, {sums.data(), width}};
  if (nontemporal && whole && starts_vectors(to.data, to.row)) {
    gradients<Store::nontemporal>(operands, rows, points, width);
  } else {
    gradients<Store::cached>(operands, rows, points, width);
  }
  for (int64_t r = 0; r < rows && !whole; ++r) {
    std::copy(padded.data() + r * width, padded.data() + r * width + columns, to_a + r * dim + first);
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
                                int64_t points, int64_t dim, int64_t first, int64_t last, bool nontemporal, float* to_a,
                                float* to_b) {
  backward(g, 2 * scale, a, b, rows, points, dim, first, last, nontemporal, to_a, to_b);
}

void squared_distances_backward(const double* g, double scale, const double* a, const double* b, int64_t rows,
                                int64_t points, int64_t dim, int64_t first, int64_t last, bool nontemporal,
                                double* to_a, double* to_b) {
  backward(g, 2 * scale, a, b, rows, points, dim, first, last, nontemporal, to_a, to_b);
}

}  // namespace innerloop::INNERLOOP_ISA
