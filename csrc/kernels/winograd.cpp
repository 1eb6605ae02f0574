#include "kernels/winograd.h"

#include <algorithm>

namespace innerloop::INNERLOOP_ISA {
namespace {

// The finite interpolation points of F(M×M); the last one is infinity. A point and its negative stand side by side.
// ±5/8, ±3/2 halve the error that ±1, ±2 give; ±3/4, 2 take a third off that of ±1, 2.
template <int M>
constexpr double interpolation_points[M + 1] = {};
template <>
constexpr double interpolation_points<2>[3] = {0, 1, -1};
template <>
constexpr double interpolation_points<3>[4] = {0, 0.75, -0.75, 2};
template <>
constexpr double interpolation_points<4>[5] = {0, 0.625, -0.625, 1.5, -1.5};

// A transform: a row of coefficients for each point. Where two rows differ in the sign of the odd columns alone (those
// of a point and its negative often do), they are made together, which saves half of the multiplications.
template <int P, int Columns>
struct Matrix {
  double at[P][Columns];
  bool first_of_pair[P];

  constexpr void find_pairs() {
    for (int i = 0; i + 1 < P; ++i) {
      bool pair = at[i][1] != 0 && (i == 0 || !first_of_pair[i - 1]);
      for (int k = 0; k < Columns; ++k) pair = pair && at[i + 1][k] == (k % 2 == 0 ? at[i][k] : -at[i][k]);
      first_of_pair[i] = pair;
    }
  }
};

template <int M>
struct Matrices {
  static constexpr int P = M + 2;
  Matrix<P, P> input;   // Bᵀ
  Matrix<P, 3> weight;  // G
  Matrix<P, M> output;  // A
};

// Toom and Cook's construction: polynomials are evaluated at the points, multiplied there, and interpolated. Row i of
// Bᵀ holds the coefficients of Π_{j≠i} (x − a_j); its norm Π_{j≠i} (a_i − a_j) divides row i of G.
template <int M>
constexpr Matrices<M> make_matrices() {
  constexpr int P = M + 2;
  constexpr int finite = M + 1;
  const auto& a = interpolation_points<M>;
  Matrices<M> result{};
  for (int i = 0; i < P; ++i) {
    double coefficients[P] = {1};
    double norm = 1;
    int degree = 0;
    for (int j = 0; j < finite; ++j) {
      if (j == i) continue;
      ++degree;
      for (int k = degree; k > 0; --k) coefficients[k] = coefficients[k - 1] - a[j] * coefficients[k];
      coefficients[0] *= -a[j];
      if (i < finite) norm *= a[i] - a[j];
    }
    const double sign = norm < 0 ? -1 : 1;
    for (int k = 0; k < P; ++k) result.input.at[i][k] = sign * coefficients[k];
    double power = 1;
    for (int k = 0; k < P && i < finite; ++k, power *= a[i]) {
      if (k < 3) result.weight.at[i][k] = power / (sign * norm);
      if (k < M) result.output.at[i][k] = power;
    }
  }
  result.weight.at[P - 1][2] = 1;
  result.output.at[P - 1][M - 1] = 1;
  result.input.find_pairs();
  result.weight.find_pairs();
  result.output.find_pairs();
  return result;
}

template <int M>
constexpr Matrices<M> matrices = make_matrices<M>();

// sum + c · x with the constant folded into the instruction that it needs; `empty` means that sum holds nothing yet.
template <class T>
[[gnu::always_inline]] inline void add_scaled(double c, Vector<T> x, Vector<T>& sum, bool& empty) {
  if (c == 0) return;
  if (empty) {
    sum = c == 1 ? x : c == -1 ? -x : x * T(c);
  } else {
    sum = c == 1 ? sum + x : c == -1 ? sum - x : sum + x * T(c);
  }
  empty = false;
}

// y = C x.
template <class T, int P, int Columns>
[[gnu::always_inline]] inline void apply(const Matrix<P, Columns>& c, const Vector<T>* x, Vector<T>* y) {
  INNERLOOP_UNROLL
  for (int i = 0; i < P; ++i) {
    if (i > 0 && c.first_of_pair[i - 1]) continue;
    Vector<T> even{}, odd{};
    bool no_even = true, no_odd = true;
    INNERLOOP_UNROLL
    for (int j = 0; j < Columns; ++j) {
      if (c.first_of_pair[i] && j % 2 == 1) {
        add_scaled<T>(c.at[i][j], x[j], odd, no_odd);
      } else {
        add_scaled<T>(c.at[i][j], x[j], even, no_even);
      }
    }
    if (c.first_of_pair[i]) {
      y[i] = even + odd;
      y[i + 1] = even - odd;
    } else {
      y[i] = even;
    }
  }
}

// y = Cᵀ x.
template <class T, int P, int Columns>
[[gnu::always_inline]] inline void apply_transposed(const Matrix<P, Columns>& c, const Vector<T>* x, Vector<T>* y) {
  Vector<T> parts[P];  // of a pair: its sum, for the even columns, and its difference, for the odd ones
  INNERLOOP_UNROLL
  for (int i = 0; i < P; ++i) {
    if (i > 0 && c.first_of_pair[i - 1]) continue;
    parts[i] = c.first_of_pair[i] ? x[i] + x[i + 1] : x[i];
    if (c.first_of_pair[i]) parts[i + 1] = x[i] - x[i + 1];
  }
  INNERLOOP_UNROLL
  for (int j = 0; j < Columns; ++j) {
    bool empty = true;
    INNERLOOP_UNROLL
    for (int i = 0; i < P; ++i) {
      if (i > 0 && c.first_of_pair[i - 1]) continue;
      add_scaled<T>(c.at[i][j], c.first_of_pair[i] ? parts[i + j % 2] : parts[i], y[j], empty);
    }
  }
}

// Where tile number `index` of a group lies.
struct TilePlace {
  int64_t image, y, x;
};

template <int M>
inline TilePlace place(const WinogradShape& shape, int64_t index) {
  const int64_t across = (shape.width + M - 1) / M;
  const int64_t of_image = winograd_tiles(M, shape.height, shape.width);
  const int64_t rest = index % of_image;
  return {index / of_image, rest / across * M, rest % across * M};
}

// Some tiles as transforms see them.
struct TileRange {
  int64_t first, count;
};

// to [P·P][tiles][channels] = C t Cᵀ for the N × N pixels t of each tile; pixels beyond height × width are zeros.
template <class T, int M, int P, int N>
void transform_tiles(const Matrix<P, N>& c, const WinogradShape& shape, ImageLayout layout, int64_t height,
                     int64_t width, int64_t channels, TileRange range, const T* from, const T* zeros, T* to) {
  constexpr int L = lanes<T>;
  const int64_t stride = winograd_stride(range.count, channels);
  for (int64_t t = 0; t < range.count; ++t) {
    const TilePlace at = place<M>(shape, range.first + t);
    const T* origin = from + at.image * layout.image + at.y * layout.row + at.x * channels;
    const T* pixels[N][N];
    for (int y = 0; y < N; ++y) {
      for (int x = 0; x < N; ++x) {
        pixels[y][x] = at.y + y < height && at.x + x < width ? origin + y * layout.row + x * channels : zeros;
      }
    }
    T* target = to + t * channels;
    for (int64_t channel = 0; channel < channels; channel += L) {
      Vector<T> half[N][P];
      INNERLOOP_UNROLL
      for (int x = 0; x < N; ++x) {
        Vector<T> column[N];
        INNERLOOP_UNROLL
        for (int y = 0; y < N; ++y) column[y] = load(pixels[y][x] + channel);
        apply<T>(c, column, half[x]);
      }
      INNERLOOP_UNROLL
      for (int y = 0; y < P; ++y) {
        Vector<T> row[N], whole[P];
        INNERLOOP_UNROLL
        for (int x = 0; x < N; ++x) row[x] = half[x][y];
        apply<T>(c, row, whole);
        INNERLOOP_UNROLL
        for (int x = 0; x < P; ++x) store(target + (y * P + x) * stride + channel, whole[x]);
      }
    }
  }
}

// y = bias + Aᵀ m A for the products m [P·P][tiles][outputs] of each tile.
template <class T, int M>
void output_tiles(const WinogradShape& shape, TileRange range, const T* products, const T* bias, T* y) {
  constexpr int L = lanes<T>;
  constexpr int P = M + 2;
  const int64_t channels = shape.outputs;
  const int64_t stride = winograd_stride(range.count, channels);
  for (int64_t t = 0; t < range.count; ++t) {
    const TilePlace at = place<M>(shape, range.first + t);
    const T* from = products + t * channels;
    T* to = y + at.image * shape.output.image + at.y * shape.output.row + at.x * channels;
    const int64_t rows = std::min<int64_t>(M, shape.height - at.y);
    const int64_t columns = std::min<int64_t>(M, shape.width - at.x);
    for (int64_t channel = 0; channel < channels; channel += L) {
      const Vector<T> start = bias ? load(bias + channel) : Vector<T>{};
      Vector<T> half[P][M];
      INNERLOOP_UNROLL
      for (int p = 0; p < P; ++p) {
        Vector<T> column[P];
        INNERLOOP_UNROLL
        for (int q = 0; q < P; ++q) column[q] = load(from + (q * P + p) * stride + channel);
        apply_transposed<T>(matrices<M>.output, column, half[p]);
      }
      INNERLOOP_UNROLL
      for (int i = 0; i < M; ++i) {
        if (i >= rows) break;
        Vector<T> row[P], whole[M];
        INNERLOOP_UNROLL
        for (int p = 0; p < P; ++p) row[p] = half[p][i];
        apply_transposed<T>(matrices<M>.output, row, whole);
        INNERLOOP_UNROLL
        for (int j = 0; j < M; ++j) {
          if (j < columns) store(to + i * shape.output.row + j * channels + channel, whole[j] + start);
        }
      }
    }
  }
}

// Calls work(range) for the tiles of all images, in chunks of about the same size.
template <class T, class Work>
void for_chunks(const WinogradShape& shape, Work work) {
  const int64_t tiles = shape.images * winograd_tiles(shape.tile, shape.height, shape.width);
  const int64_t limit = winograd_chunk(shape.tile, shape.inputs, shape.outputs, sizeof(T));
  const int64_t chunks = (tiles + limit - 1) / limit;
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    const int64_t first = tiles * chunk / chunks;
    work(TileRange{first, tiles * (chunk + 1) / chunks - first});
  }
}

// The parts of the scratch memory.
template <class T>
struct Scratch {
  Scratch(const WinogradShape& shape, T* memory)
      : zeros(memory),
        input(zeros + std::max(shape.inputs, shape.outputs)),
        second(input + part(shape, shape.inputs)),
        output(second + part(shape, shape.inputs)) {
    std::fill(zeros, input, T(0));
  }
  static int64_t part(const WinogradShape& shape, int64_t channels) {
    const int64_t tiles = winograd_chunk(shape.tile, shape.inputs, shape.outputs, sizeof(T));
    return winograd_points(shape.tile) * winograd_stride(tiles, channels);
  }
  T* zeros;
  T* input;   // transformed tiles of the input
  T* second;  // of a second term's input
  T* output;  // products, or transformed tiles of dy
};

template <class T, int M>
void transform_input(const WinogradShape& shape, TileRange range, const T* x, const T* zeros, T* to) {
  transform_tiles<T, M>(matrices<M>.input, shape, shape.input, shape.height + 2, shape.width + 2, shape.inputs, range,
                        x, zeros, to);
}

template <class T, int M>
void convolve(const WinogradShape& shape, const Terms<T>& terms, const T* bias, T* y, T* memory) {
  const Scratch<T> scratch(shape, memory);
  const int64_t weights = winograd_stride(shape.inputs, shape.outputs);
  for_chunks<T>(shape, [&](TileRange range) {
    const int64_t in_stride = winograd_stride(range.count, shape.inputs);
    const int64_t out_stride = winograd_stride(range.count, shape.outputs);
    const bool two = terms.second.a != nullptr;
    transform_input<T, M>(shape, range, terms.first.a, scratch.zeros, scratch.input);
    if (two) transform_input<T, M>(shape, range, terms.second.a, scratch.zeros, scratch.second);
    const ProductShape product{.rows = range.count,
                               .inner = shape.inputs,
                               .columns = shape.outputs,
                               .a_row = shape.inputs,
                               .b_row = shape.outputs,
                               .out_row = shape.outputs};
    for (int64_t point = 0; point < winograd_points(M); ++point) {
      Terms<T> at_point{{scratch.input + point * in_stride, terms.first.b + point * weights}};
      if (two) at_point.second = {scratch.second + point * in_stride, terms.second.b + point * weights};
      multiply<T>(product, at_point, nullptr, scratch.output + point * out_stride);
    }
    output_tiles<T, M>(shape, range, scratch.output, bias, y);
  });
}

template <class T, int M>
void outer(const WinogradShape& shape, const T* x, const T* dy, T* u, T* memory) {
  const Scratch<T> scratch(shape, memory);
  for_chunks<T>(shape, [&](TileRange range) {
    const int64_t in_stride = winograd_stride(range.count, shape.inputs);
    const int64_t out_stride = winograd_stride(range.count, shape.outputs);
    transform_input<T, M>(shape, range, x, scratch.zeros, scratch.input);
    transform_tiles<T, M>(matrices<M>.output, shape, shape.output, shape.height, shape.width, shape.outputs, range, dy,
                          scratch.zeros, scratch.output);
    const OuterShape product{range.count, shape.inputs, shape.outputs, shape.inputs, shape.outputs, shape.outputs};
    for (int64_t point = 0; point < winograd_points(M); ++point) {
      add_outer<T>(product, scratch.input + point * in_stride, scratch.output + point * out_stride,
                   u + point * winograd_stride(shape.inputs, shape.outputs));
    }
  });
}

template <class T, int M>
void transform_weights(int64_t inputs, int64_t outputs, const T* w, T* transformed) {
  constexpr int P = M + 2;
  const int64_t size = inputs * outputs, stride = winograd_stride(inputs, outputs);
  for (int64_t e = 0; e < size; e += lanes<T>) {
    Vector<T> half[3][P];
    INNERLOOP_UNROLL
    for (int x = 0; x < 3; ++x) {
      const Vector<T> column[3] = {load(w + x * size + e), load(w + (3 + x) * size + e), load(w + (6 + x) * size + e)};
      apply<T>(matrices<M>.weight, column, half[x]);
    }
    INNERLOOP_UNROLL
    for (int y = 0; y < P; ++y) {
      const Vector<T> row[3] = {half[0][y], half[1][y], half[2][y]};
      Vector<T> whole[P];
      apply<T>(matrices<M>.weight, row, whole);
      INNERLOOP_UNROLL
      for (int x = 0; x < P; ++x) store(transformed + (y * P + x) * stride + e, whole[x]);
    }
  }
}

template <class T, int M>
void add_gradient(int64_t inputs, int64_t outputs, const T* u, T* gradient) {
  constexpr int P = M + 2;
  const int64_t size = inputs * outputs, stride = winograd_stride(inputs, outputs);
  for (int64_t e = 0; e < size; e += lanes<T>) {
    Vector<T> half[P][3];
    INNERLOOP_UNROLL
    for (int x = 0; x < P; ++x) {
      Vector<T> column[P];
      INNERLOOP_UNROLL
      for (int y = 0; y < P; ++y) column[y] = load(u + (y * P + x) * stride + e);
      apply_transposed<T>(matrices<M>.weight, column, half[x]);
    }
    INNERLOOP_UNROLL
    for (int y = 0; y < 3; ++y) {
      Vector<T> row[P], whole[3];
      INNERLOOP_UNROLL
      for (int x = 0; x < P; ++x) row[x] = half[x][y];
      apply_transposed<T>(matrices<M>.weight, row, whole);
      INNERLOOP_UNROLL
      for (int x = 0; x < 3; ++x) {
        T* to = gradient + (y * 3 + x) * size + e;
        store(to, load(to) + whole[x]);
      }
    }
  }
}

}  // namespace

int64_t winograd_chunk(int tile, int64_t inputs, int64_t outputs, int64_t element_bytes) {
  constexpr int64_t cache_bytes = 1200 * 1024;
  return std::clamp<int64_t>(cache_bytes / (winograd_points(tile) * (inputs + outputs) * element_bytes), 12, 96);
}

template <class T>
int64_t winograd_scratch(int tile, int64_t inputs, int64_t outputs) {
  const WinogradShape shape{tile, 1, 1, 1, inputs, outputs, {}, {}};
  return std::max(inputs, outputs) + 2 * Scratch<T>::part(shape, inputs) + Scratch<T>::part(shape, outputs);
}

// Calls FUNCTION<T, M>(...) for the tile M.
#define INNERLOOP_FOR_TILE(tile, FUNCTION, ...) \
  switch (tile) {                               \
    case 2:                                     \
      return FUNCTION<T, 2>(__VA_ARGS__);       \
    case 3:                                     \
      return FUNCTION<T, 3>(__VA_ARGS__);       \
    default:                                    \
      return FUNCTION<T, 4>(__VA_ARGS__);       \
  }

template <class T>
void winograd_weights(int tile, int64_t inputs, int64_t outputs, const T* w, T* transformed) {
  INNERLOOP_FOR_TILE(tile, transform_weights, inputs, outputs, w, transformed)
}

template <class T>
void winograd_add_gradient(int tile, int64_t inputs, int64_t outputs, const T* u, T* gradient) {
  INNERLOOP_FOR_TILE(tile, add_gradient, inputs, outputs, u, gradient)
}

template <class T>
void winograd_convolve(const WinogradShape& shape, const Terms<T>& terms, const T* bias, T* y, T* scratch) {
  INNERLOOP_FOR_TILE(shape.tile, convolve, shape, terms, bias, y, scratch)
}

template <class T>
void winograd_add_outer(const WinogradShape& shape, const T* x, const T* dy, T* u,
                        T* scratch){INNERLOOP_FOR_TILE(shape.tile, outer, shape, x, dy, u, scratch)}

#define INNERLOOP_INSTANTIATE(T)                                                               \
  template int64_t winograd_scratch<T>(int, int64_t, int64_t);                                 \
  template void winograd_weights<T>(int, int64_t, int64_t, const T*, T*);                      \
  template void winograd_add_gradient<T>(int, int64_t, int64_t, const T*, T*);                 \
  template void winograd_convolve<T>(const WinogradShape&, const Terms<T>&, const T*, T*, T*); \
  template void winograd_add_outer<T>(const WinogradShape&, const T*, const T*, T*, T*);
INNERLOOP_INSTANTIATE(float) INNERLOOP_INSTANTIATE(double)

}  // namespace innerloop::INNERLOOP_ISA
