#include "kernels/distance.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <iterator>
#include <utility>
#include <vector>

#include "kernels/exponential.h"
#include "kernels/gemm.h"
#include "kernels/tiles.h"

namespace innerloop::INNERLOOP_ISA {
namespace {

// --- products with rows in the lanes --------------------------------------------------------------------------------

// Rows whose distances are found together: a vector holds one coordinate, or one point's product, of several of them.
constexpr int block_vectors = 2;
template <class T>
constexpr int64_t row_block = block_vectors * lanes<T>;

// Coordinates for which a block of rows, packed, stays in the nearest cache while the points pass.
constexpr int64_t dimension_block = 128;

// A block's vectors are cut into strips of two; a rest of three is one strip.
constexpr int strip_width(int64_t vectors) {
  return vectors == 3 ? 3 : vectors >= 2 ? 2 : 1;
}

// Points of a tile: its sums, a vector of rows and a broadcast coordinate fill the registers.
constexpr int product_points(int vectors) {
  if (vector_registers == 32) return vectors == 3 ? 8 : 14;
  return vectors == 3 ? 4 : vectors == 2 ? 6 : 12;
}

// products[j][i] += Σ_d points[j][d] rows[d][i] for N points and a strip of V vectors of rows.
template <class T, int N, int V>
[[gnu::noinline]] void product_tile(int64_t count, const T* points, int64_t dim, const T* rows, T* products) {
  constexpr int L = lanes<T>;
  Vector<T> sums[N][V] = {};
  for (int64_t d = 0; d < count; ++d, rows += row_block<T>) {
    Vector<T> row[V];
    INNERLOOP_UNROLL
    for (int v = 0; v < V; ++v) row[v] = load(rows + v * L);
    INNERLOOP_UNROLL
    for (int j = 0; j < N; ++j) {
      const Vector<T> coordinate = broadcast(points[j * dim + d]);
      INNERLOOP_UNROLL
      for (int v = 0; v < V; ++v) sums[j][v] += coordinate * row[v];
    }
  }
  INNERLOOP_UNROLL
  for (int j = 0; j < N; ++j) {
    T* to = products + j * row_block<T>;
    INNERLOOP_UNROLL
    for (int v = 0; v < V; ++v) store(to + v * L, load(to + v * L) + sums[j][v]);
  }
}

// The tiles of 1 … N points.
template <class T, int V, int... J>
constexpr auto product_tiles(std::integer_sequence<int, J...>) {
  return std::array{&product_tile<T, J + 1, V>...};
}

template <class T, int V>
void product_strip(int64_t count, const T* points, int64_t point_count, int64_t dim, const T* rows, T* products) {
  constexpr int N = product_points(V);
  static constexpr auto tiles = product_tiles<T, V>(std::make_integer_sequence<int, N>());
  in_tiles<N>(point_count, [&](int64_t j, int64_t height) {
    tiles[static_cast<size_t>(height - 1)](count, points + j * dim, dim, rows, products + j * row_block<T>);
  });
}

// norms[i] += Σ_d rows[d][i]² for a block of rows.
template <class T>
void add_squares(int64_t count, const T* rows, T* norms) {
  Vector<T> sums[2][block_vectors] = {};  // two sums: additions need not wait for one another
  for (int64_t d = 0; d < count; ++d, rows += row_block<T>) {
    INNERLOOP_UNROLL
    for (int v = 0; v < block_vectors; ++v) {
      const Vector<T> row = load(rows + v * lanes<T>);
      sums[0][v] += row * row;
    }
    std::swap(sums[0], sums[1]);
  }
  for (int v = 0; v < block_vectors; ++v) {
    store(norms + v * lanes<T>, load(norms + v * lanes<T>) + (sums[0][v] + sums[1][v]));
  }
}

// products [points][a block of rows] and norms [a block of rows].
template <class T>
void multiply_block(const T* a, const T* points, int64_t rows, int64_t count, int64_t dim, T* products, T* norms) {
  constexpr int L = lanes<T>;
  constexpr int64_t line = 64 / sizeof(T);
  const int64_t vectors = vectors_of<T>(rows);
  alignas(vector_bytes) T packed[dimension_block * row_block<T>];
  if (rows < row_block<T>) std::fill(std::begin(packed), std::end(packed), T(0));
  for (int64_t d = 0; d < dim; d += dimension_block) {
    const int64_t some = std::min(dimension_block, dim - d);
    transpose(rows, some, a + d, dim, packed, row_block<T>);
    // The next block of rows: their lines are read far apart, which no processor foresees.
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t j = 0; j < some; j += line) __builtin_prefetch(a + (i + row_block<T>)*dim + d + j, 0, 2);
    }
    add_squares(some, packed, norms);
    for (int64_t v = 0; v < vectors;) {
      const int strip = strip_width(vectors - v);
      const T* from = packed + v * L;
      T* to = products + v * L;
      if (strip == 3) {
        product_strip<T, 3>(some, points + d, count, dim, from, to);
      } else if (strip == 2) {
        product_strip<T, 2>(some, points + d, count, dim, from, to);
      } else {
        product_strip<T, 1>(some, points + d, count, dim, from, to);
      }
      v += strip;
    }
  }
}

// --- products with few points ----------------------------------------------------------------------------------------

// With few points a tile reads more than it multiplies. There a vector holds coordinates of one row or point instead,
// and the rows need not be packed.
template <class T>
constexpr int few = std::min(5 * lanes<T> / 8, 8);

// Rows of a tile: a sum for each point and the norm, a vector of each point and one of the row fill the registers.
constexpr int dot_rows(int points) {
  return std::clamp((vector_registers - 1 - points) / (points + 1), 1, 4);
}

// products[j][i] += Σ_d a[i][d] points[j][d] and norms[i] += Σ_d a[i][d]² for R rows and N points.
template <class T, int R, int N>
[[gnu::noinline]] void dot_tile(int64_t count, const T* a, const T* points, int64_t dim, T* products, T* norms) {
  constexpr int L = lanes<T>;
  Vector<T> sums[R][N] = {}, squares[R] = {};
  const auto step = [&](int64_t d, auto load_some) {
    Vector<T> point[N];
    INNERLOOP_UNROLL
    for (int j = 0; j < N; ++j) point[j] = load_some(points + j * dim + d);
    INNERLOOP_UNROLL
    for (int i = 0; i < R; ++i) {
      const Vector<T> row = load_some(a + i * dim + d);
      squares[i] += row * row;
      INNERLOOP_UNROLL
      for (int j = 0; j < N; ++j) sums[i][j] += row * point[j];
    }
  };
  int64_t d = 0;
  for (; d + L <= count; d += L) step(d, [](const T* from) { return load(from); });
  if (d < count) step(d, [&](const T* from) { return load_part(from, count - d); });
  for (int i = 0; i < R; ++i) {
    norms[i] += sum<T>(squares[i]);
    for (int j = 0; j < N; ++j) products[j * row_block<T> + i] += sum<T>(sums[i][j]);
  }
}

template <class T, int N, int... I>
constexpr auto dot_tiles(std::integer_sequence<int, I...>) {
  return std::array{&dot_tile<T, I + 1, N>...};
}

// Coordinates that the points stay in the nearest cache for; of the longest sum that a lane makes, a 64th.
template <class T>
constexpr int64_t dot_block = 64 * lanes<T>;

template <class T, int N>
void multiply_few(const T* a, const T* points, int64_t rows, int64_t dim, T* products, T* norms) {
  constexpr int R = dot_rows(N);
  static constexpr auto tiles = dot_tiles<T, N>(std::make_integer_sequence<int, R>());
  for (int64_t d = 0; d < dim; d += dot_block<T>) {
    const int64_t count = std::min(dot_block<T>, dim - d);
    in_tiles<R>(rows, [&](int64_t i, int64_t height) {
      tiles[static_cast<size_t>(height - 1)](count, a + i * dim + d, points + d, dim, products + i, norms + i);
    });
  }
}

template <class T, int... J>
constexpr auto few_multipliers(std::integer_sequence<int, J...>) {
  return std::array{&multiply_few<T, J + 1>...};
}

template <class T>
void multiply_few_points(const T* a, const T* points, int64_t rows, int64_t count, int64_t dim, T* products, T* norms) {
  static constexpr auto multipliers = few_multipliers<T>(std::make_integer_sequence<int, few<T>>());
  multipliers[static_cast<size_t>(count - 1)](a, points, rows, dim, products, norms);
}

// --- from products to distances --------------------------------------------------------------------------------------

// Σ map(i) over i = 0 … count-1, where map makes a vector of so many numbers, or of what is left.
template <class T, class Load>
T sum_of_squares(int64_t count, const Load& difference) {
  constexpr int L = lanes<T>;
  Vector<T> even{}, odd{};  // two sums: additions need not wait for one another
  int64_t d = 0;
  for (; d + 2 * L <= count; d += 2 * L) {
    const Vector<T> first = difference(d, L), second = difference(d + L, L);
    even += first * first;
    odd += second * second;
  }
  for (; d < count; d += L) {
    const Vector<T> rest = difference(d, std::min<int64_t>(L, count - d));
    even += rest * rest;
  }
  return sum<T>(even + odd);
}

template <class T>
Vector<T> load_up_to(const T* from, int64_t count) {
  return count == lanes<T> ? load(from) : load_part(from, count);
}

template <class T>
T squared_norm(const T* a, int64_t count) {
  return sum_of_squares<T>(count, [&](int64_t d, int64_t some) { return load_up_to(a + d, some); });
}

template <class T>
T squared_distance(const T* a, const T* b, int64_t count) {
  return sum_of_squares<T>(count,
                           [&](int64_t d, int64_t some) { return load_up_to(a + d, some) - load_up_to(b + d, some); });
}

// Of ‖a‖² + ‖b‖²: what is below that, rounding has eaten too much of, and is summed from differences instead.
template <class T>
constexpr T least_share = T(1) / 16;

// Scaled distances [points][a block of rows], where the products were.
template <class T>
void distances_of_products(const T* a, const T* points, int64_t rows, int64_t count, int64_t dim, const T* norms,
                           const T* point_norms, T scale, T* distances) {
  constexpr int L = lanes<T>;
  const auto is_lost = [](auto value, auto norm) { return !(value >= least_share<T> * norm); };  // NaN is too
  decltype(Vector<T>{} > Vector<T>{}) any_lost{};
  for (int64_t j = 0; j < count; ++j) {
    T* of_point = distances + j * row_block<T>;
    for (int64_t i = 0; i < rows; i += L) {
      const Vector<T> norm = load(norms + i) + point_norms[j], value = norm - 2 * load(of_point + i);
      any_lost |= is_lost(value, norm);
      store(of_point + i, scale * value);
    }
  }
  bool any = false;
  for (int i = 0; i < L; ++i) any |= any_lost[i] != 0;
  if (!any) return;
  for (int64_t j = 0; j < count; ++j) {
    for (int64_t i = 0; i < rows; ++i) {
      T& value = distances[j * row_block<T> + i];
      if (!is_lost(value / scale, norms[i] + point_norms[j])) continue;
      value = scale * squared_distance(a + i * dim, points + j * dim, dim);
    }
  }
}

template <class T>
struct alignas(vector_bytes) AlignedVector {
  T values[lanes<T>];
};

// Calls finish(first row, rows, their scaled distances [points][a block of rows]) for blocks of rows.
template <class T, class Finish>
void scaled_distances(const T* a, const T* b, int64_t rows, int64_t points, int64_t dim, T scale,
                      const Finish& finish) {
  if (points == 0) return;
  std::vector<T> point_norms(static_cast<size_t>(points));
  for (int64_t j = 0; j < points; ++j) point_norms[static_cast<size_t>(j)] = squared_norm(b + j * dim, dim);
  std::vector<AlignedVector<T>> block(static_cast<size_t>(vectors_of<T>(points) * lanes<T> * block_vectors));
  T* distances = block.data()->values;
  for (int64_t i = 0; i < rows; i += row_block<T>) {
    const int64_t count = std::min(row_block<T>, rows - i);
    T norms[row_block<T>] = {};
    std::fill(distances, distances + points * row_block<T>, T(0));
    if (points <= few<T>) {
      multiply_few_points(a + i * dim, b, count, points, dim, distances, norms);
    } else {
      multiply_block(a + i * dim, b, count, points, dim, distances, norms);
    }
    distances_of_products(a + i * dim, b, count, points, dim, norms, point_norms.data(), scale, distances);
    finish(i, count, distances);
  }
}

// --- results ---------------------------------------------------------------------------------------------------------

// Σ over rows of −log softmax(row)[label]. The logarithm is taken of products of the softmax's sums, each at least 1.
template <class T>
class CrossEntropy {
 public:
  // Adds the logits [points][a block of rows], and makes them weight · (softmax − one-hot(label)), zeros where a row's
  // label is -1.
  void add(T* logits, int64_t rows, int64_t points, const int64_t* labels, T weight) {
    constexpr int L = lanes<T>;
    T tops[row_block<T>], totals[row_block<T>], weights[row_block<T>] = {};
    for (int64_t i = 0; i < rows; i += L) {
      Vector<T> top = load(logits + i);
      for (int64_t j = 1; j < points; ++j) {
        const Vector<T> logit = load(logits + j * row_block<T> + i);
        top = logit > top ? logit : top;
      }
      store(tops + i, top);
    }
    for (int64_t i = 0; i < rows; ++i) {
      if (labels[i] < 0) continue;
      below_ += static_cast<double>(tops[i] - logits[labels[i] * row_block<T> + i]);
      weights[i] = weight;
    }
    for (int64_t i = 0; i < rows; i += L) {
      const Vector<T> top = load(tops + i);
      Vector<T> total{};
      for (int64_t j = 0; j < points; ++j) {
        T* of_point = logits + j * row_block<T> + i;
        const Vector<T> term = exponential(load(of_point) - top);
        total += term;
        store(of_point, term);
      }
      store(totals + i, total);
    }
    for (int64_t i = 0; i < rows; ++i) {
      double& product = products_[i % 4];
      if (labels[i] >= 0) product *= static_cast<double>(totals[i]);
      if (product > 1e250) take_logarithm(product);
    }
    for (int64_t i = 0; i < rows; i += L) {
      const Vector<T> factor = load(weights + i) / load(totals + i);
      for (int64_t j = 0; j < points; ++j) {
        T* of_point = logits + j * row_block<T> + i;
        store(of_point, load(of_point) * factor);
      }
    }
    for (int64_t i = 0; i < rows; ++i) {
      if (labels[i] >= 0) logits[labels[i] * row_block<T> + i] -= weight;
    }
  }

  double total() {
    for (double& product : products_) take_logarithm(product);
    return below_ + logarithms_;
  }

 private:
  void take_logarithm(double& product) {
    logarithms_ += std::log(product);
    product = 1;
  }

  double below_ = 0, logarithms_ = 0;
  double products_[4] = {1, 1, 1, 1};  // multiplications need not wait for one another
};

// out [rows][points] of a block [points, whole vectors of them][a block of rows]. Whole vectors are written: what one
// holds beyond its row, later ones overwrite; where out ends, elements.
template <class T>
void write_rows(const T* block, int64_t rows, int64_t points, T* out) {
  constexpr int L = lanes<T>;
  const T* end = out + rows * points;
  alignas(vector_bytes) T tile[L * L];
  for (int64_t i = 0; i < rows; i += L) {
    for (int64_t j = (points - 1) / L * L; j >= 0; j -= L) {
      transpose(L, L, block + j * row_block<T> + i, row_block<T>, tile, L);
      const int64_t height = std::min<int64_t>(L, rows - i), width = std::min<int64_t>(L, points - j);
      T* to = out + i * points + j;
      int64_t r = 0;
      for (; r < height && end - to >= L; ++r, to += points) store(to, load(tile + r * L));
      for (; r < height; ++r, to += points) std::copy(tile + r * L, tile + r * L + width, to);
    }
  }
}

template <class T>
void distances(const T* a, const T* b, int64_t rows, int64_t points, int64_t dim, T scale, T* out) {
  scaled_distances(a, b, rows, points, dim, scale, [&](int64_t first, int64_t count, const T* block) {
    write_rows(block, count, points, out + first * points);
  });
}

template <class T>
double distances_loss(const T* a, const T* b, int64_t rows, int64_t points, int64_t dim, T scale, const int64_t* labels,
                      T weight, T* out, T* gradient) {
  CrossEntropy<T> loss;
  scaled_distances(a, b, rows, points, dim, scale, [&](int64_t first, int64_t count, T* block) {
    write_rows(block, count, points, out + first * points);
    loss.add(block, count, points, labels + first, weight);
    write_rows(block, count, points, gradient + first * points);
  });
  return loss.total();
}

}  // namespace

void squared_distances(const float* a, const float* b, int64_t rows, int64_t points, int64_t dim, float scale,
                       float* out) {
  distances(a, b, rows, points, dim, scale, out);
}

void squared_distances(const double* a, const double* b, int64_t rows, int64_t points, int64_t dim, double scale,
                       double* out) {
  distances(a, b, rows, points, dim, scale, out);
}

double squared_distances_loss(const float* a, const float* b, int64_t rows, int64_t points, int64_t dim, float scale,
                              const int64_t* labels, float weight, float* out, float* gradient) {
  return distances_loss(a, b, rows, points, dim, scale, labels, weight, out, gradient);
}

double squared_distances_loss(const double* a, const double* b, int64_t rows, int64_t points, int64_t dim, double scale,
                              const int64_t* labels, double weight, double* out, double* gradient) {
  return distances_loss(a, b, rows, points, dim, scale, labels, weight, out, gradient);
}

}  // namespace innerloop::INNERLOOP_ISA
