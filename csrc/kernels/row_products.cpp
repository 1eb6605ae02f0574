#include "kernels/row_products.h"

#include <algorithm>

#include "kernels/simd.h"

namespace innerloop::INNERLOOP_ISA {
namespace {

constexpr int L = lanes<double>;
using Sum = Vector<double>;

template <class T>
Sum load_doubles(const T* from) {
  typedef T Part __attribute__((vector_size(L * sizeof(T))));
  Part part;
  std::memcpy(&part, from, sizeof(part));
  return __builtin_convertvector(part, Sum);
}

template <class T>
Sum load_doubles(const T* from, int64_t count) {
  Sum v{};
  for (int64_t i = 0; i < count; ++i) v[i] = from[i];
  return v;
}

template <class T>
void store_doubles(T* to, Sum v) {
  typedef T Part __attribute__((vector_size(L * sizeof(T))));
  const Part part = __builtin_convertvector(v, Part);
  std::memcpy(to, &part, sizeof(part));
}

// out[i][j] += a tile of P × Q products over some of the inner dimension.
template <class T, int P, int Q>
[[gnu::noinline]] void product_tile(int64_t inner, const T* a, const T* b, int64_t row, double* out, int64_t out_row) {
  Sum sums[P][Q] = {};
  const auto step = [&](auto&& load_some, int64_t r) {
    Sum of_b[Q];
    INNERLOOP_UNROLL
    for (int j = 0; j < Q; ++j) of_b[j] = load_some(b + j * row + r);
    INNERLOOP_UNROLL
    for (int i = 0; i < P; ++i) {
      const Sum of_a = load_some(a + i * row + r);
      INNERLOOP_UNROLL
      for (int j = 0; j < Q; ++j) sums[i][j] += of_a * of_b[j];
    }
  };
  int64_t r = 0;
  for (; r + L <= inner; r += L) step([](const T* from) { return load_doubles(from); }, r);
  if (r < inner) step([&](const T* from) { return load_doubles(from, inner - r); }, r);
  for (int i = 0; i < P; ++i) {
    for (int j = 0; j < Q; ++j) out[i * out_row + j] += sum<double>(sums[i][j]);
  }
}

// Elements of every row that stay in the nearest caches while all tiles pass over them.
constexpr int64_t inner_chunk = 512;

template <class T>
void products(const T* a, const T* b, int64_t a_rows, int64_t b_rows, int64_t inner, double* out, int64_t out_row) {
  constexpr int P = vector_registers == 32 ? 5 : 3;  // P² sums and a row of b in registers
  for (int64_t i = 0; i < a_rows; ++i) std::fill_n(out + i * out_row, b_rows, 0.0);
  for (int64_t r = 0; r < inner; r += inner_chunk) {
    const int64_t length = std::min(inner_chunk, inner - r);
    for (int64_t i = 0; i < a_rows;) {
      const int64_t down = a_rows - i >= P ? P : 1;
      for (int64_t j = 0; j < b_rows;) {
        const int64_t across = b_rows - j >= P ? P : 1;
        const auto tile = down == P ? (across == P ? product_tile<T, P, P> : product_tile<T, P, 1>)
                                    : (across == P ? product_tile<T, 1, P> : product_tile<T, 1, 1>);
        tile(length, a + i * inner + r, b + j * inner + r, inner, out + i * out_row + j, out_row);
        j += across;
      }
      i += down;
    }
  }
}

// A tile of R rows of the result, V vectors wide.
template <class T, int R, int V>
[[gnu::noinline]] void combination_tile(const double* coefficients, const T* rows, int64_t in_rows, int64_t row,
                                        T* out) {
  Sum sums[R][V] = {};
  for (int64_t j = 0; j < in_rows; ++j) {
    Sum of_row[V];
    INNERLOOP_UNROLL
    for (int v = 0; v < V; ++v) of_row[v] = load_doubles(rows + j * row + v * L);
    INNERLOOP_UNROLL
    for (int i = 0; i < R; ++i) {
      const Sum coefficient = Sum{} + coefficients[i * in_rows + j];
      INNERLOOP_UNROLL
      for (int v = 0; v < V; ++v) sums[i][v] += coefficient * of_row[v];
    }
  }
  for (int i = 0; i < R; ++i) {
    INNERLOOP_UNROLL
    for (int v = 0; v < V; ++v) store_doubles(out + i * row + v * L, sums[i][v]);
  }
}

template <class T, int V>
void combination_strip(const double* coefficients, const T* rows, int64_t out_rows, int64_t in_rows, int64_t row,
                       T* out) {
  constexpr int R = vector_registers == 32 ? 5 : 3;
  int64_t i = 0;
  for (; i + R <= out_rows; i += R) {
    combination_tile<T, R, V>(coefficients + i * in_rows, rows, in_rows, row, out + i * row);
  }
  for (; i < out_rows; ++i) {
    combination_tile<T, 1, V>(coefficients + i * in_rows, rows, in_rows, row, out + i * row);
  }
}

template <class T>
void combinations(const double* coefficients, const T* rows, int64_t out_rows, int64_t in_rows, int64_t columns,
                  int64_t row, T* out) {
  constexpr int V = vector_registers == 32 ? 4 : 3;
  int64_t r = 0;
  for (; r + V * L <= columns; r += V * L) {
    combination_strip<T, V>(coefficients, rows + r, out_rows, in_rows, row, out + r);
  }
  for (; r + L <= columns; r += L) {
    combination_strip<T, 1>(coefficients, rows + r, out_rows, in_rows, row, out + r);
  }
  for (; r < columns; ++r) {
    for (int64_t i = 0; i < out_rows; ++i) {
      double total = 0;
      for (int64_t j = 0; j < in_rows; ++j) total += coefficients[i * in_rows + j] * rows[j * row + r];
      out[i * row + r] = static_cast<T>(total);
    }
  }
}

}  // namespace

void inner_products(const float* a, const float* b, int64_t a_rows, int64_t b_rows, int64_t inner, double* out,
                    int64_t out_row) {
  products(a, b, a_rows, b_rows, inner, out, out_row);
}

void inner_products(const double* a, const double* b, int64_t a_rows, int64_t b_rows, int64_t inner, double* out,
                    int64_t out_row) {
  products(a, b, a_rows, b_rows, inner, out, out_row);
}

void combine_rows(const double* coefficients, const float* rows, int64_t out_rows, int64_t in_rows, int64_t columns,
                  int64_t row, float* out) {
  combinations(coefficients, rows, out_rows, in_rows, columns, row, out);
}

void combine_rows(const double* coefficients, const double* rows, int64_t out_rows, int64_t in_rows, int64_t columns,
                  int64_t row, double* out) {
  combinations(coefficients, rows, out_rows, in_rows, columns, row, out);
}

}  // namespace innerloop::INNERLOOP_ISA
