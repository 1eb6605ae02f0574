#include "kernels/gemm.h"

#include <algorithm>
#include <array>
#include <utility>

namespace innerloop::INNERLOOP_ISA {
namespace {

// Rows of a register tile that is `vectors` wide: its sums, the vectors of b and a broadcast element fill the
// registers.
constexpr int tile_rows(int vectors) {
  if (vector_registers == 32) return vectors == 3 ? 8 : 14;
  return vectors == 3 ? 4 : vectors == 2 ? 6 : 12;
}
constexpr int max_tile_rows = 14;

// Columns are cut into tiles of two vectors; a rest of three is one tile.
constexpr int tile_width(int64_t vectors) {
  return vectors == 3 ? 3 : vectors >= 2 ? 2 : 1;
}

// How a product walks the inner dimension.
struct Walk {
  int64_t segments;
  int64_t segment_stride;
  int64_t length;   // of a segment, in steps
  int64_t a_inner;  // elements of a from step to step
  int64_t b_row;
};

template <class T>
struct Start {
  const T* bias;  // or null
  bool add;       // to what out holds
};

template <class T, int R, int V>
[[gnu::noinline]] void product_tile(const Walk& walk, const Terms<T>& terms, const int64_t* a_offsets,
                                    const int64_t* out_offsets, Start<T> start, T* out) {
  constexpr int L = lanes<T>;
  Vector<T> sums[R][V] = {};  // not what they start from: see outer_tile
  for (const Term<T>* term : {&terms.first, &terms.second}) {
    if (term->a == nullptr) continue;
    const T* b = term->b;
    for (int64_t segment = 0; segment < walk.segments; ++segment) {
      const T* rows[R];
      for (int i = 0; i < R; ++i) rows[i] = term->a + a_offsets[i] + segment * walk.segment_stride;
      const int64_t end = walk.length * walk.a_inner;
      for (int64_t r = 0; r != end; r += walk.a_inner, b += walk.b_row) {
        Vector<T> row_of_b[V];
        INNERLOOP_UNROLL
        for (int v = 0; v < V; ++v) row_of_b[v] = load(b + v * L);
        INNERLOOP_UNROLL
        for (int i = 0; i < R; ++i) {
          const Vector<T> element = broadcast(rows[i][r]);
          INNERLOOP_UNROLL
          for (int v = 0; v < V; ++v) sums[i][v] += element * row_of_b[v];
        }
      }
    }
  }
  Vector<T> bias[V];
  INNERLOOP_UNROLL
  for (int v = 0; v < V; ++v) bias[v] = start.bias ? load(start.bias + v * L) : Vector<T>{};
  INNERLOOP_UNROLL
  for (int i = 0; i < R; ++i) {
    T* to = out + out_offsets[i];
    INNERLOOP_UNROLL
    for (int v = 0; v < V; ++v) store(to + v * L, (start.add ? load(to + v * L) : bias[v]) + sums[i][v]);
  }
}

// The tiles of 1 … tile_rows(V) rows.
template <class T, int V, int... I>
constexpr auto product_tiles(std::integer_sequence<int, I...>) {
  return std::array{&product_tile<T, I + 1, V>...};
}

template <class T, int V, class AOffset, class OutOffset>
void product_strip(const Walk& walk, int64_t rows, const Terms<T>& terms, AOffset a_offset, OutOffset out_offset,
                   Start<T> start, T* out) {
  constexpr int R = tile_rows(V);
  static constexpr auto tiles = product_tiles<T, V>(std::make_integer_sequence<int, R>());
  int64_t a_offsets[R], out_offsets[R];
  for (int64_t first = 0; first < rows; first += R) {
    const int count = static_cast<int>(std::min<int64_t>(R, rows - first));
    for (int i = 0; i < count; ++i) {
      a_offsets[i] = a_offset(first + i);
      out_offsets[i] = out_offset(first + i);
    }
    tiles[count - 1](walk, terms, a_offsets, out_offsets, start, out);
  }
}

template <class T, class AOffset, class OutOffset>
void product(const Walk& walk, int64_t rows, int64_t columns, Terms<T> terms, AOffset a_offset, OutOffset out_offset,
             Start<T> start, T* out) {
  for (int64_t j = 0; j < columns;) {
    const int width = tile_width((columns - j) / lanes<T>);
    if (width == 3) {
      product_strip<T, 3>(walk, rows, terms, a_offset, out_offset, start, out);
    } else if (width == 2) {
      product_strip<T, 2>(walk, rows, terms, a_offset, out_offset, start, out);
    } else {
      product_strip<T, 1>(walk, rows, terms, a_offset, out_offset, start, out);
    }
    const int64_t step = width * lanes<T>;
    j += step;
    out += step;
    terms.first.b += step;
    if (terms.second.a != nullptr) terms.second.b += step;
    if (start.bias != nullptr) start.bias += step;
  }
}

// Terms of the longest sum; a longer one is the sum of such sums, which keeps float32 within twice torch's error.
constexpr int64_t inner_chunk = 400;

template <class T>
void strided_product(const ProductShape& shape, const Terms<T>& terms, Start<T> start, T* out) {
  const auto from = [&](const Term<T>& term, int64_t r) {
    return term.a ? Term<T>{term.a + r * shape.a_inner, term.b + r * shape.b_row} : Term<T>{};
  };
  for (int64_t r = 0; r < shape.inner; r += inner_chunk, start = {nullptr, true}) {
    const Walk walk{1, 0, std::min(inner_chunk, shape.inner - r), shape.a_inner, shape.b_row};
    product<T>(
        walk, shape.rows, shape.columns, {from(terms.first, r), from(terms.second, r)},
        [&](int64_t i) { return i * shape.a_row; }, [&](int64_t i) { return i * shape.out_row; }, start, out);
  }
}

template <class T, int R, int V>
[[gnu::noinline]] void outer_tile(int64_t points, const T* a, const int32_t* a_offsets, const T* b,
                                  const int32_t* b_offsets, T* out, int64_t out_row) {
  constexpr int L = lanes<T>;
  Vector<T> sums[R][V] = {};  // not out: small terms added to what is large already would lose their last bits
  for (int64_t p = 0; p < points; ++p) {
    const T* elements = a + a_offsets[p];
    // The rows of a lie far apart: no processor sees by itself that the next tile will read their next elements.
    __builtin_prefetch(elements + 64 / sizeof(T));
    Vector<T> row_of_b[V];
    INNERLOOP_UNROLL
    for (int v = 0; v < V; ++v) row_of_b[v] = load(b + b_offsets[p] + v * L);
    INNERLOOP_UNROLL
    for (int i = 0; i < R; ++i) {
      const Vector<T> element = broadcast(elements[i]);
      INNERLOOP_UNROLL
      for (int v = 0; v < V; ++v) sums[i][v] += element * row_of_b[v];
    }
  }
  INNERLOOP_UNROLL
  for (int i = 0; i < R; ++i) {
    INNERLOOP_UNROLL
    for (int v = 0; v < V; ++v) store(out + i * out_row + v * L, load(out + i * out_row + v * L) + sums[i][v]);
  }
}

template <class T, int V, int... I>
constexpr auto outer_tiles(std::integer_sequence<int, I...>) {
  return std::array{&outer_tile<T, I + 1, V>...};
}

template <class T, int V>
void outer_strip(int64_t points, int64_t rows, const T* a, const int32_t* a_offsets, const T* b,
                 const int32_t* b_offsets, T* out, int64_t out_row) {
  constexpr int R = tile_rows(V);
  static constexpr auto tiles = outer_tiles<T, V>(std::make_integer_sequence<int, R>());
  for (int64_t k = 0; k < rows; k += R) {
    const int64_t count = std::min<int64_t>(R, rows - k);
    tiles[static_cast<size_t>(count - 1)](points, a + k, a_offsets, b, b_offsets, out + k * out_row, out_row);
  }
}

template <class T>
void outer(int64_t points, int64_t rows, int64_t columns, const T* a, const int32_t* a_offsets, const T* b,
           const int32_t* b_offsets, T* out, int64_t out_row) {
  for (int64_t j = 0; j < columns;) {
    const int width = tile_width((columns - j) / lanes<T>);
    if (width == 3) {
      outer_strip<T, 3>(points, rows, a, a_offsets, b + j, b_offsets, out + j, out_row);
    } else if (width == 2) {
      outer_strip<T, 2>(points, rows, a, a_offsets, b + j, b_offsets, out + j, out_row);
    } else {
      outer_strip<T, 1>(points, rows, a, a_offsets, b + j, b_offsets, out + j, out_row);
    }
    j += width * lanes<T>;
  }
}

// Points that a and b stay in the nearest cache for, while all tiles of the result pass over them.
constexpr int64_t outer_chunk = 98;

// A tile of P × Q dot products.
template <class T, int P, int Q>
void dot_tile(int64_t inner, const T* a, int64_t a_row, const T* b, int64_t b_row, T add, T* out, int64_t out_row) {
  constexpr int L = lanes<T>;
  Vector<T> sums[P][Q] = {};
  const auto step = [&](auto&& load_some, int64_t r) {
    Vector<T> of_b[Q];
    INNERLOOP_UNROLL
    for (int j = 0; j < Q; ++j) of_b[j] = load_some(b + j * b_row + r);
    INNERLOOP_UNROLL
    for (int i = 0; i < P; ++i) {
      const Vector<T> of_a = load_some(a + i * a_row + r);
      INNERLOOP_UNROLL
      for (int j = 0; j < Q; ++j) sums[i][j] += of_a * of_b[j];
    }
  };
  int64_t r = 0;
  for (; r + L <= inner; r += L) step([](const T* from) { return load(from); }, r);
  if (r < inner) step([&](const T* from) { return load_part(from, inner - r); }, r);
  for (int i = 0; i < P; ++i) {
    for (int j = 0; j < Q; ++j) out[i * out_row + j] = add + sum<T>(sums[i][j]);
  }
}

// The L × L block of in, transposed. First inside of the vectors' 16 bytes of G elements, log₂G times: of G rows, i and
// i + G/2 are interleaved into 2i and 2i + 1. Then whole 16 bytes, log₂(L/G) times: of the rows G apart, the even 16
// bytes of 2i and 2i + 1 go to i, the odd ones to the second half. Both are single instructions.
template <class T, int... I>
inline void transpose_block(const T* in, int64_t in_row, T* out, int64_t out_row, std::integer_sequence<int, I...>) {
  constexpr int L = lanes<T>, G = 16 / sizeof(T);
  Vector<T> rows[L], next[L];
  INNERLOOP_UNROLL
  for (int i = 0; i < L; ++i) rows[i] = load(in + i * in_row);
  INNERLOOP_UNROLL
  for (int times = 1; times < G; times *= 2) {
    INNERLOOP_UNROLL
    for (int i = 0; i < L; i += 2) {
      const Vector<T> first = rows[i / G * G + i % G / 2], second = rows[i / G * G + i % G / 2 + G / 2];
      next[i] = __builtin_shufflevector(first, second, (I / G * G + I % G / 2 + I % 2 * L)...);
      next[i + 1] = __builtin_shufflevector(first, second, (I / G * G + G / 2 + I % G / 2 + I % 2 * L)...);
    }
    INNERLOOP_UNROLL
    for (int i = 0; i < L; ++i) rows[i] = next[i];
  }
  INNERLOOP_UNROLL
  for (int times = 1; times < L / G; times *= 2) {
    INNERLOOP_UNROLL
    for (int i = 0; i < L / 2; ++i) {
      const Vector<T> first = rows[i / G * 2 * G + i % G], second = rows[i / G * 2 * G + G + i % G];
      next[i] = __builtin_shufflevector(first, second, (I / G * 2 * G + I % G)...);
      next[i + L / 2] = __builtin_shufflevector(first, second, (I / G * 2 * G + G + I % G)...);
    }
    INNERLOOP_UNROLL
    for (int i = 0; i < L; ++i) rows[i] = next[i];
  }
  INNERLOOP_UNROLL
  for (int i = 0; i < L; ++i) store(out + i * out_row, rows[i]);
}

}  // namespace

template <class T>
void multiply(const ProductShape& shape, const Terms<T>& terms, const T* bias, T* out) {
  strided_product<T>(shape, terms, {bias, false}, out);
}

template <class T>
void multiply_add(const ProductShape& shape, const Terms<T>& terms, T* out) {
  strided_product<T>(shape, terms, {nullptr, true}, out);
}

template <class T>
void multiply_patches(const PatchShape& shape, const Terms<T>& terms, const int32_t* a_offsets,
                      const int32_t* out_offsets, const T* bias, T* out) {
  const Walk walk{shape.segments, shape.segment_stride, shape.segment_length, 1, shape.columns};
  product<T>(
      walk, shape.rows, shape.columns, terms, [&](int64_t i) { return int64_t{a_offsets[i]}; },
      [&](int64_t i) { return int64_t{out_offsets[i]}; }, {bias, false}, out);
}

template <class T>
void add_outer(const OuterShape& shape, const T* a, const T* b, T* out) {
  int32_t a_offsets[outer_chunk], b_offsets[outer_chunk];
  for (int64_t p = 0; p < outer_chunk; ++p) {
    a_offsets[p] = static_cast<int32_t>(p * shape.a_row);
    b_offsets[p] = static_cast<int32_t>(p * shape.b_row);
  }
  for (int64_t p = 0; p < shape.points; p += outer_chunk) {
    outer(std::min(outer_chunk, shape.points - p), shape.rows, shape.columns, a + p * shape.a_row, a_offsets,
          b + p * shape.b_row, b_offsets, out, shape.out_row);
  }
}

template <class T>
void add_outer_patches(const PatchShape& shape, const T* a, const int32_t* a_offsets, const T* b,
                       const int32_t* b_offsets, T* out) {
  for (int64_t p = 0; p < shape.rows; p += outer_chunk) {
    for (int64_t s = 0; s < shape.segments; ++s) {
      outer(std::min(outer_chunk, shape.rows - p), shape.segment_length, shape.columns, a + s * shape.segment_stride,
            a_offsets + p, b, b_offsets + p, out + s * shape.segment_length * shape.columns, shape.columns);
    }
  }
}

template <class T>
void multiply_rows(int64_t a_rows, int64_t b_rows, int64_t inner, const T* a, int64_t a_row, const T* b, int64_t b_row,
                   T add, T* out, int64_t out_row) {
  constexpr int P = vector_registers == 32 ? 5 : 3;  // P² sums and a row of b in registers
  for (int64_t j = 0; j < b_rows;) {
    const int64_t across = b_rows - j >= P ? P : 1;
    for (int64_t i = 0; i < a_rows;) {
      const int64_t down = a_rows - i >= P ? P : 1;
      const auto tile = down == P ? (across == P ? dot_tile<T, P, P> : dot_tile<T, P, 1>)
                                  : (across == P ? dot_tile<T, 1, P> : dot_tile<T, 1, 1>);
      tile(inner, a + i * a_row, a_row, b + j * b_row, b_row, add, out + i * out_row + j, out_row);
      i += down;
    }
    j += across;
  }
}

template <class T>
void transpose(int64_t rows, int64_t columns, const T* in, int64_t in_row, T* out, int64_t out_row) {
  constexpr int L = lanes<T>;
  const int64_t whole_rows = rows - rows % L;
  const int64_t whole_columns = columns - columns % L;
  for (int64_t i = 0; i < whole_rows; i += L) {
    for (int64_t j = 0; j < whole_columns; j += L) {
      transpose_block(in + i * in_row + j, in_row, out + j * out_row + i, out_row,
                      std::make_integer_sequence<int, L>());
    }
  }
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = i < whole_rows ? whole_columns : 0; j < columns; ++j) out[j * out_row + i] = in[i * in_row + j];
  }
}

template <class T>
void add_column_sums(int64_t rows, int64_t columns, const T* a, int64_t a_row, T* sums) {
  constexpr int L = lanes<T>;
  for (int64_t j = 0; j < columns; j += L) {
    Vector<T> even = load(sums + j), odd{};  // two sums: additions need not wait for one another
    int64_t i = 0;
    for (; i + 2 <= rows; i += 2) {
      even += load(a + i * a_row + j);
      odd += load(a + (i + 1) * a_row + j);
    }
    if (i < rows) even += load(a + i * a_row + j);
    store(sums + j, even + odd);
  }
}

#define INNERLOOP_INSTANTIATE(T)                                                                                       \
  template void multiply<T>(const ProductShape&, const Terms<T>&, const T*, T*);                                       \
  template void multiply_add<T>(const ProductShape&, const Terms<T>&, T*);                                             \
  template void multiply_patches<T>(const PatchShape&, const Terms<T>&, const int32_t*, const int32_t*, const T*, T*); \
  template void add_outer<T>(const OuterShape&, const T*, const T*, T*);                                               \
  template void add_outer_patches<T>(const PatchShape&, const T*, const int32_t*, const T*, const int32_t*, T*);       \
  template void multiply_rows<T>(int64_t, int64_t, int64_t, const T*, int64_t, const T*, int64_t, T, T*, int64_t);     \
  template void transpose<T>(int64_t, int64_t, const T*, int64_t, T*, int64_t);                                        \
  template void add_column_sums<T>(int64_t, int64_t, const T*, int64_t, T*);
INNERLOOP_INSTANTIATE(float)
INNERLOOP_INSTANTIATE(double)

}  // namespace innerloop::INNERLOOP_ISA
