#include "kernels/distance.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <utility>
#include <vector>

#include "kernels/exponential.h"
#include "kernels/gemm.h"
#include "kernels/tiles.h"

namespace innerloop::INNERLOOP_ISA {
namespace {

// --- distances ------------------------------------------------------------------------------------------------------

// Points are cut into strips of two vectors; a rest of three is one strip.
constexpr int strip_width(int64_t vectors) {
  return vectors == 3 ? 3 : vectors >= 2 ? 2 : 1;
}

// Rows of a tile: its sums, a vector of points and a broadcast coordinate fill the registers.
constexpr int product_rows(int vectors) {
  if (vector_registers == 32) return vectors == 3 ? 8 : 14;
  return vectors == 3 ? 4 : vectors == 2 ? 6 : 12;
}

constexpr int64_t row_block = 60;         // rows whose distances are summed up together
constexpr int64_t dimension_block = 128;  // for which a strip stays in the nearest cache while the rows pass

// out[i][j] += Σ_d a[i][d] points[d][j] for R rows and a strip of V vectors of points.
template <class T, int R, int V>
[[gnu::noinline]] void product_tile(int64_t count, const T* a, int64_t dim, const T* points, T* out, int64_t out_row) {
  constexpr int L = lanes<T>;
  Vector<T> sums[R][V] = {};
  for (int64_t d = 0; d < count; ++d, points += V * L) {
    Vector<T> point[V];
    INNERLOOP_UNROLL
    for (int v = 0; v < V; ++v) point[v] = load(points + v * L);
    INNERLOOP_UNROLL
    for (int i = 0; i < R; ++i) {
      const Vector<T> coordinate = broadcast(a[i * dim + d]);
      INNERLOOP_UNROLL
      for (int v = 0; v < V; ++v) sums[i][v] += coordinate * point[v];
    }
  }
  INNERLOOP_UNROLL
  for (int i = 0; i < R; ++i) {
    INNERLOOP_UNROLL
    for (int v = 0; v < V; ++v) store(out + i * out_row + v * L, load(out + i * out_row + v * L) + sums[i][v]);
  }
}

// The tiles of 1 … R rows.
template <class T, int V, int... I>
constexpr auto product_tiles(std::integer_sequence<int, I...>) {
  return std::array{&product_tile<T, I + 1, V>...};
}

template <class T, int V>
void product_strip(int64_t rows, int64_t count, const T* a, int64_t dim, const T* points, T* out, int64_t out_row) {
  constexpr int R = product_rows(V);
  static constexpr auto tiles = product_tiles<T, V>(std::make_integer_sequence<int, R>());
  in_tiles<R>(rows, [&](int64_t i, int64_t height) {
    tiles[static_cast<size_t>(height - 1)](count, a + i * dim, dim, points, out + i * out_row, out_row);
  });
}

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

// products [rows][whole vectors of points] and norms [rows] of at most row_block rows.
template <class T>
void multiply_points(const T* a, const T* packed, int64_t rows, int64_t points, int64_t dim, T* products, T* norms) {
  const int64_t vectors = vectors_of<T>(points), width = vectors * lanes<T>;
  std::fill(products, products + rows * width, T(0));
  std::fill(norms, norms + rows, T(0));
  for (int64_t d = 0; d < dim; d += dimension_block) {
    const int64_t count = std::min(dimension_block, dim - d);
    for (int64_t i = 0; i < rows; ++i) norms[i] += squared_norm(a + i * dim + d, count);
    for (int64_t v = 0; v < vectors;) {
      const int strip = strip_width(vectors - v);
      const T* from = packed + v * lanes<T> * dim + d * strip * lanes<T>;
      T* to = products + v * lanes<T>;
      if (strip == 3) {
        product_strip<T, 3>(rows, count, a + d, dim, from, to, width);
      } else if (strip == 2) {
        product_strip<T, 2>(rows, count, a + d, dim, from, to, width);
      } else {
        product_strip<T, 1>(rows, count, a + d, dim, from, to, width);
      }
      v += strip;
    }
  }
}

// --- products with few points ----------------------------------------------------------------------------------------

// Most of a vector of few points would be empty. There a vector holds coordinates of one row or point instead, and the
// points need not be packed.
template <class T>
constexpr int few = std::min(5 * lanes<T> / 8, 8);

template <class T>
bool are_few(int64_t points) {
  return points <= few<T>;
}

// Rows of a tile: a sum for each point and the norm, a vector of each point and one of the row fill the registers.
constexpr int dot_rows(int points) {
  return std::clamp((vector_registers - 1 - points) / (points + 1), 1, 4);
}

// products[i][j] += Σ_d a[i][d] points[j][d] and norms[i] += Σ_d a[i][d]² for R rows and N points.
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
    for (int j = 0; j < N; ++j) products[i * L + j] += sum<T>(sums[i][j]);
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
      tiles[static_cast<size_t>(height - 1)](count, a + i * dim + d, points + d, dim, products + i * lanes<T>,
                                             norms + i);
    });
  }
}

template <class T, int... I>
constexpr auto few_multipliers(std::integer_sequence<int, I...>) {
  return std::array{&multiply_few<T, I + 1>...};
}

// products [rows][a vector] and norms [rows].
template <class T>
void multiply_few_points(const T* a, const T* points, int64_t rows, int64_t count, int64_t dim, T* products, T* norms) {
  static constexpr auto multipliers = few_multipliers<T>(std::make_integer_sequence<int, few<T>>());
  std::fill(products, products + rows * lanes<T>, T(0));
  std::fill(norms, norms + rows, T(0));
  multipliers[static_cast<size_t>(count - 1)](a, points, rows, dim, products, norms);
}

// --- from products to distances --------------------------------------------------------------------------------------

// Of ‖a‖² + ‖b‖²: what is below that, rounding has eaten too much of, and is summed from differences instead.
template <class T>
constexpr T least_share = T(1) / 16;

// distances [rows][whole vectors of points], where multiply_points' products were.
template <class T>
void distances_of_products(const T* a, const T* points, const T* point_norms, int64_t rows, int64_t count, int64_t dim,
                           const T* norms, T* distances) {
  constexpr int L = lanes<T>;
  const int64_t width = vectors_of<T>(count) * L;
  const auto is_lost = [](auto value, auto norm) { return !(value >= least_share<T> * norm); };  // NaN is too
  decltype(Vector<T>{} > Vector<T>{}) any_lost{};
  for (int64_t i = 0; i < rows; ++i) {
    T* row = distances + i * width;
    for (int64_t j = 0; j < width; j += L) {
      const Vector<T> norm = norms[i] + load(point_norms + j), value = norm - 2 * load(row + j);
      any_lost |= is_lost(value, norm);
      store(row + j, value);
    }
  }
  bool any = false;
  for (int i = 0; i < L; ++i) any |= any_lost[i] != 0;
  if (!any) return;
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < count; ++j) {
      T& value = distances[i * width + j];
      if (is_lost(value, norms[i] + point_norms[j])) value = squared_distance(a + i * dim, points + j * dim, dim);
    }
  }
}

// Elements of the packed points before their norms.
template <class T>
int64_t packed_coordinates(int64_t points, int64_t dim) {
  return are_few<T>(points) ? 0 : vectors_of<T>(points) * lanes<T> * dim;
}

template <class T>
void pack(const T* points, int64_t count, int64_t dim, T* packed) {
  const int64_t vectors = vectors_of<T>(count);
  for (int64_t v = are_few<T>(count) ? vectors : 0; v < vectors;) {
    const int64_t strip = strip_width(vectors - v), width = strip * lanes<T>;
    const int64_t here = std::min(width, count - v * lanes<T>);
    transpose(here, dim, points + v * lanes<T> * dim, dim, packed, width);
    for (int64_t d = 0; d < dim; ++d) std::fill(packed + d * width + here, packed + (d + 1) * width, T(0));
    packed += dim * width;
    v += strip;
  }
  for (int64_t j = 0; j < vectors * lanes<T>; ++j) packed[j] = j < count ? squared_norm(points + j * dim, dim) : T(0);
}

// --- rows of results -------------------------------------------------------------------------------------------------

// Rows of whole vectors go to rows of `columns` elements: what a vector holds beyond a row is overwritten by the next.
template <class T>
class RowWriter {
 public:
  RowWriter(T* out, int64_t rows, int64_t columns)
      : out_(out), end_(out + rows * columns), columns_(columns), width_(vectors_of<T>(columns) * lanes<T>) {}

  void write(const T* rows, int64_t count) {
    for (; count > 0; --count, rows += width_, out_ += columns_) {
      if (end_ - out_ >= width_) {
        for (int64_t j = 0; j < width_; j += lanes<T>) store(out_ + j, load(rows + j));
      } else {
        std::copy(rows, rows + columns_, out_);
      }
    }
  }

 private:
  T *out_, *const end_;
  const int64_t columns_, width_;
};

// Σ over rows of −log softmax(row)[label]. The logarithm is taken of products of the softmax's sums, each at least 1.
template <class T>
class CrossEntropy {
 public:
  // Adds rows of whole vectors, and makes them weight · (softmax(row) − one-hot(label)), zeros where the label is -1.
  // In passes over all of the rows, for what is done to one is a long chain, each link waiting for the one before it.
  void add(T* rows, int64_t count, int64_t width, const int64_t* labels, T weight) {
    constexpr int L = lanes<T>;
    const auto larger = [](auto a, auto b) { return a > b ? a : b; };
    for (int64_t r = 0; r < count; ++r) {
      T* row = rows + r * width;
      Vector<T> tops = load(row);
      for (int64_t j = L; j < width; j += L) tops = larger(load(row + j), tops);
      const T top = folded(tops, larger);
      if (labels[r] >= 0) below_ += static_cast<double>(top - row[labels[r]]);
      for (int64_t j = 0; j < width; j += L) store(row + j, load(row + j) - top);
    }
    for (int64_t j = 0; j < count * width; j += L) store(rows + j, exponential(load(rows + j)));
    for (int64_t r = 0; r < count; ++r) {
      T* row = rows + r * width;
      Vector<T> sums = load(row);
      for (int64_t j = L; j < width; j += L) sums += load(row + j);
      const T total = sum<T>(sums), factor = labels[r] < 0 ? 0 : weight / total;
      for (int64_t j = 0; j < width; j += L) store(row + j, load(row + j) * factor);
      if (labels[r] < 0) continue;
      row[labels[r]] -= weight;
      product_ *= static_cast<double>(total);
      if (product_ > 1e250) take_logarithm();
    }
  }

  double total() {
    take_logarithm();
    return below_ + logarithms_;
  }

 private:
  void take_logarithm() {
    logarithms_ += std::log(product_);
    product_ = 1;
  }

  double below_ = 0, logarithms_ = 0, product_ = 1;
};

// Calls finish(first row, rows, their scaled distances, −∞ beyond the last point) for blocks of rows.
template <class T, class Finish>
void scaled_distances(const T* a, const T* b, const T* packed, int64_t rows, int64_t points, int64_t dim, T scale,
                      const Finish& finish) {
  constexpr int L = lanes<T>;
  const int64_t width = vectors_of<T>(points) * L;
  if (width == 0) return;
  Vector<T> beyond{};
  for (int64_t j = points; j < width; ++j) beyond[j - (width - L)] = -std::numeric_limits<T>::infinity();
  std::vector<T> sums(static_cast<size_t>(std::min(row_block, rows) * width));
  T norms[row_block];
  for (int64_t i = 0; i < rows; i += row_block) {
    const int64_t count = std::min(row_block, rows - i);
    if (are_few<T>(points)) {
      multiply_few_points(a + i * dim, b, count, points, dim, sums.data(), norms);
    } else {
      multiply_points(a + i * dim, packed, count, points, dim, sums.data(), norms);
    }
    distances_of_products(a + i * dim, b, packed + packed_coordinates<T>(points, dim), count, points, dim, norms,
                          sums.data());
    for (int64_t r = 0; r < count; ++r) {
      T* row = sums.data() + r * width;
      for (int64_t j = 0; j < width - L; j += L) store(row + j, load(row + j) * scale);
      store(row + width - L, load(row + width - L) * scale + beyond);
    }
    finish(i, count, sums.data());
  }
}

template <class T>
void distances(const T* a, const T* b, const T* packed, int64_t rows, int64_t points, int64_t dim, T scale, T* out) {
  RowWriter<T> writer(out, rows, points);
  scaled_distances(a, b, packed, rows, points, dim, scale,
                   [&](int64_t, int64_t count, const T* block) { writer.write(block, count); });
}

template <class T>
double distances_loss(const T* a, const T* b, const T* packed, int64_t rows, int64_t points, int64_t dim, T scale,
                      const int64_t* labels, T weight, T* out, T* gradient) {
  RowWriter<T> logits(out, rows, points), gradients(gradient, rows, points);
  const int64_t width = vectors_of<T>(points) * lanes<T>;
  CrossEntropy<T> loss;
  scaled_distances(a, b, packed, rows, points, dim, scale, [&](int64_t first, int64_t count, T* block) {
    logits.write(block, count);
    loss.add(block, count, width, labels + first, weight);
    gradients.write(block, count);
  });
  return loss.total();
}

}  // namespace

int64_t packed_points_size(const float*, int64_t count, int64_t dim) {
  return packed_coordinates<float>(count, dim) + vectors_of<float>(count) * lanes<float>;
}

int64_t packed_points_size(const double*, int64_t count, int64_t dim) {
  return packed_coordinates<double>(count, dim) + vectors_of<double>(count) * lanes<double>;
}

void pack_points(const float* points, int64_t count, int64_t dim, float* packed) {
  pack(points, count, dim, packed);
}

void pack_points(const double* points, int64_t count, int64_t dim, double* packed) {
  pack(points, count, dim, packed);
}

void squared_distances(const float* a, const float* b, const float* packed, int64_t rows, int64_t points, int64_t dim,
                       float scale, float* out) {
  distances(a, b, packed, rows, points, dim, scale, out);
}

void squared_distances(const double* a, const double* b, const double* packed, int64_t rows, int64_t points,
                       int64_t dim, double scale, double* out) {
  distances(a, b, packed, rows, points, dim, scale, out);
}

double squared_distances_loss(const float* a, const float* b, const float* packed, int64_t rows, int64_t points,
                              int64_t dim, float scale, const int64_t* labels, float weight, float* out,
                              float* gradient) {
  return distances_loss(a, b, packed, rows, points, dim, scale, labels, weight, out, gradient);
}

double squared_distances_loss(const double* a, const double* b, const double* packed, int64_t rows, int64_t points,
                              int64_t dim, double scale, const int64_t* labels, double weight, double* out,
                              double* gradient) {
  return distances_loss(a, b, packed, rows, points, dim, scale, labels, weight, out, gradient);
}

}  // namespace innerloop::INNERLOOP_ISA
