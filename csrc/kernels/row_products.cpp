#include "kernels/row_products.h"

#include <algorithm>
#include <array>
#include <type_traits>
#include <utility>
#include <vector>

#include "kernels/nontemporal.h"

namespace innerloop::INNERLOOP_ISA {
namespace {

// Throughout, A is the type of sums and T that of rows.

template <class A, class T>
Vector<A> load_as(const T* from) {
  typedef T Elements __attribute__((vector_size(lanes<A> * sizeof(T))));
  Elements elements;
  std::memcpy(&elements, from, sizeof(elements));
  return __builtin_convertvector(elements, Vector<A>);
}

template <class A, class T>
Vector<A> load_as(const T* from, int64_t count) {
  Vector<A> v{};
  for (int64_t i = 0; i < count; ++i) v[i] = from[i];
  return v;
}

template <Store kind, class A, class T>
void store_as(T* to, Vector<A> v) {
  if constexpr (std::is_same_v<A, T>) {
    store<kind>(to, v);
  } else {
    typedef T Elements __attribute__((vector_size(lanes<A> * sizeof(T))));
    const Elements elements = __builtin_convertvector(v, Elements);
    std::memcpy(to, &elements, sizeof(elements));
  }
}

// Rows and columns of a register tile, whose sums and a row of operands fill the registers.
constexpr int square = vector_registers == 32 ? 5 : 3;
// Where one side of a product has at most `few` rows, each row of the other meets one tile alone. Such a tile has so
// many rows of the long side, or vectors of them.
constexpr int few = 5;
constexpr int beside_few = vector_registers == 32 ? 4 : 2;

// Elements that a walk down many rows, more than a CPU follows by itself, asks memory for in advance.
constexpr int64_t ahead = 64;

template <class T>
struct Part {
  const T* data;
  int64_t row;  // distance between the rows
};

// A part of the columns of some rows as sums take it: as they lie, or where they are of another type, converted once
// for all tiles that pass over them.
template <class A, class T>
Part<A> part_of(const T* rows, int64_t count, int64_t columns, int64_t row, std::vector<A>& memory) {
  if constexpr (std::is_same_v<A, T>) {
    return {rows, row};
  } else {
    const int64_t padded = (columns + lanes<A> - 1) / lanes<A> * lanes<A>;
    memory.resize(static_cast<size_t>(count * padded));
    for (int64_t i = 0; i < count; ++i) std::copy_n(rows + i * row, columns, memory.data() + i * padded);
    return {memory.data(), padded};
  }
}

// out[i][j] += a tile of R × C products over some of the inner dimension. prefetch: the rows of a of the tile below.
template <bool prefetch, class A, class T, int R, int C>
[[gnu::noinline]] void product_tile(int64_t inner, Part<T> a, Part<A> b, A* out, int64_t out_row) {
  Vector<A> sums[R][C] = {};
  const auto step = [&](int64_t r, auto... count) {
    Vector<A> of_b[C];
    INNERLOOP_UNROLL
    for (int j = 0; j < C; ++j) of_b[j] = load_as<A>(b.data + j * b.row + r, count...);
    INNERLOOP_UNROLL
    for (int i = 0; i < R; ++i) {
      const Vector<A> of_a = load_as<A>(a.data + i * a.row + r, count...);
      if constexpr (prefetch) __builtin_prefetch(a.data + (i + R) * a.row + r, 0, 2);
      INNERLOOP_UNROLL
      for (int j = 0; j < C; ++j) sums[i][j] += of_a * of_b[j];
    }
  };
  int64_t r = 0;
  for (; r + lanes<A> <= inner; r += lanes<A>) step(r);
  if (r < inner) step(r, inner - r);
  for (int i = 0; i < R; ++i) {
    for (int j = 0; j < C; ++j) out[i * out_row + j] += sum<A>(sums[i][j]);
  }
}

// Of 1 … rows and 1 … C columns.
template <bool prefetch, class A, class T, int C, int... I>
constexpr auto product_tiles(std::integer_sequence<int, I...>) {
  return std::array{&product_tile<prefetch, A, T, I / C + 1, I % C + 1>...};
}

// A product tile by tile of R × C.
template <int R, int C, bool prefetch, class A, class T>
void add_product(Part<T> a, Part<A> b, int64_t a_rows, int64_t b_rows, int64_t inner, bool triangle, A* out,
                 int64_t out_row) {
  static constexpr auto tiles = product_tiles<prefetch, A, T, C>(std::make_integer_sequence<int, R * C>());
  for (int64_t i = 0; i < a_rows; i += R) {
    const int64_t down = std::min<int64_t>(R, a_rows - i);
    const int64_t columns = triangle ? b_rows - a_rows + i + down : b_rows;
    for (int64_t j = 0; j < columns; j += C) {
      const int64_t across = std::min<int64_t>(C, columns - j);
      tiles[(down - 1) * C + across - 1](inner, {a.data + i * a.row, a.row}, {b.data + j * b.row, b.row},
                                         out + i * out_row + j, out_row);
    }
  }
}

// Elements of every row that stay in the nearest caches while all tiles pass over them; also a limit to the longest sum
// that a lane makes, which keeps that of float32 accurate.
template <class A>
int64_t inner_chunk(int64_t b_rows) {
  return b_rows <= few ? 64 * lanes<A> : 256;
}

template <class A, class T>
void products(const T* a, const T* b, int64_t a_rows, int64_t b_rows, int64_t inner, bool triangle, A* out,
              int64_t out_row) {
  std::vector<A> memory_of_a, memory_of_b;
  for (int64_t i = 0; i < a_rows; ++i) std::fill_n(out + i * out_row, b_rows, A(0));
  const int64_t chunk = inner_chunk<A>(b_rows);
  for (int64_t r = 0; r < inner; r += chunk) {
    const int64_t length = std::min(chunk, inner - r);
    const Part<A> right = part_of<A>(b + r, b_rows, length, inner, memory_of_b);
    if (b_rows <= few) {
      add_product<beside_few, few, true>(Part<T>{a + r, inner}, right, a_rows, b_rows, length, triangle, out, out_row);
    } else {
      const Part<A> left = triangle ? Part<A>{right.data + (b_rows - a_rows) * right.row, right.row}
                                    : part_of<A>(a + r, a_rows, length, inner, memory_of_a);
      add_product<square, square, false>(left, right, a_rows, b_rows, length, triangle, out, out_row);
    }
  }
}

// A tile of R rows of the result, V vectors wide.
template <int R, int V, bool prefetch, Store kind, class A, class From, class T>
[[gnu::noinline]] void combination_tile(const A* coefficients, Part<From> rows, int64_t in_rows, int64_t out_row,
                                        T* out) {
  Vector<A> sums[R][V] = {};
  for (int64_t j = 0; j < in_rows; ++j) {
    Vector<A> of_row[V];
    INNERLOOP_UNROLL
    for (int v = 0; v < V; ++v) {
      const From* from = rows.data + j * rows.row + v * lanes<A>;
      of_row[v] = load_as<A>(from);
      if constexpr (prefetch) __builtin_prefetch(from + ahead, 0, 2);
    }
    INNERLOOP_UNROLL
    for (int i = 0; i < R; ++i) {
      const Vector<A> coefficient = Vector<A>{} + coefficients[i * in_rows + j];
      INNERLOOP_UNROLL
      for (int v = 0; v < V; ++v) sums[i][v] += coefficient * of_row[v];
    }
  }
  for (int i = 0; i < R; ++i) {
    INNERLOOP_UNROLL
    for (int v = 0; v < V; ++v) store_as<kind, A>(out + i * out_row + v * lanes<A>, sums[i][v]);
  }
}

// R rows of the result, by tiles of V vectors.
template <int R, int V, bool prefetch, Store kind, class A, class From, class T>
void combine_part(const A* coefficients, Part<From> rows, int64_t in_rows, int64_t columns, int64_t out_row, T* out) {
  constexpr int64_t L = lanes<A>;
  int64_t r = 0;
  for (; r + V * L <= columns; r += V * L) {
    combination_tile<R, V, prefetch, kind>(coefficients, Part<From>{rows.data + r, rows.row}, in_rows, out_row,
                                           out + r);
  }
  for (; r + L <= columns; r += L) {
    combination_tile<R, 1, prefetch, kind>(coefficients, Part<From>{rows.data + r, rows.row}, in_rows, out_row,
                                           out + r);
  }
  for (; r < columns; ++r) {
    for (int64_t i = 0; i < R; ++i) {
      A total = 0;
      for (int64_t j = 0; j < in_rows; ++j) total += coefficients[i * in_rows + j] * rows.data[j * rows.row + r];
      out[i * out_row + r] = static_cast<T>(total);
    }
  }
}

// Of 1 … rows.
template <int V, bool prefetch, Store kind, class A, class From, class T, int... I>
constexpr auto combine_parts(std::integer_sequence<int, I...>) {
  return std::array{&combine_part<I + 1, V, prefetch, kind, A, From, T>...};
}

template <Store kind, class A, class T>
void combinations(const A* coefficients, const T* rows, int64_t out_rows, int64_t in_rows, int64_t columns, int64_t row,
                  T* out) {
  if (out_rows <= few) {
    static constexpr auto parts =
        combine_parts<beside_few, true, kind, A, T, T>(std::make_integer_sequence<int, few>());
    if (out_rows > 0) parts[out_rows - 1](coefficients, {rows, row}, in_rows, columns, row, out);
    return;
  }
  constexpr int V = vector_registers == 32 ? 4 : 3;
  static constexpr auto parts = combine_parts<V, false, kind, A, A, T>(std::make_integer_sequence<int, square>());
  constexpr int64_t tile = V * lanes<A>;
  constexpr int64_t cached = 16384 / sizeof(A);  // elements that stay in the nearest cache
  const int64_t part = std::clamp<int64_t>(cached / std::max<int64_t>(in_rows, 1) / tile, 4, 32) * tile;
  std::vector<A> memory;
  for (int64_t r = 0; r < columns; r += part) {
    const int64_t length = std::min(part, columns - r);
    const Part<A> from = part_of<A>(rows + r, in_rows, length, row, memory);
    for (int64_t i = 0; i < out_rows; i += square) {
      const int64_t count = std::min<int64_t>(square, out_rows - i);
      parts[count - 1](coefficients + i * in_rows, from, in_rows, length, row, out + i * row + r);
    }
  }
}

// Sums of another type than the results' are not stored as whole vectors.
template <class A, class T>
void combinations(const A* coefficients, const T* rows, int64_t out_rows, int64_t in_rows, int64_t columns, int64_t row,
                  bool nontemporal, T* out) {
  if (std::is_same_v<A, T> && nontemporal && starts_vectors(out, row)) {
    combinations<Store::nontemporal>(coefficients, rows, out_rows, in_rows, columns, row, out);
    finish_stores();
  } else {
    combinations<Store::cached>(coefficients, rows, out_rows, in_rows, columns, row, out);
  }
}

}  // namespace

#define INNERLOOP_DEFINE(A, T)                                                                                      \
  void inner_products(const T* a, const T* b, int64_t a_rows, int64_t b_rows, int64_t inner, bool triangle, A* out, \
                      int64_t out_row) {                                                                            \
    products(a, b, a_rows, b_rows, inner, triangle, out, out_row);                                                  \
  }                                                                                                                 \
  void combine_rows(const A* coefficients, const T* rows, int64_t out_rows, int64_t in_rows, int64_t columns,       \
                    int64_t row, bool nontemporal, T* out) {                                                        \
    combinations(coefficients, rows, out_rows, in_rows, columns, row, nontemporal, out);                            \
  }
INNERLOOP_DEFINE(float, float)
INNERLOOP_DEFINE(double, float)
INNERLOOP_DEFINE(double, double)

}  // namespace innerloop::INNERLOOP_ISA
