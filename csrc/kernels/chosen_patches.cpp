#include "kernels/chosen_patches.h"

#if defined(__AVX512F__)
#include <immintrin.h>

namespace innerloop::INNERLOOP_ISA {
namespace {

constexpr int L = lanes<float>;
using Indices = decltype(Vector<float>{} > Vector<float>{});

Indices load_choice(const int32_t* from) {
  Indices v;
  std::memcpy(&v, from, sizeof(v));
  return v;
}

Vector<float> look_up(Vector<float> table, Indices index) {
  // The form without a mask starts from an undefined vector, which gcc 12 warns about.
  return (Vector<float>)_mm512_maskz_permutexvar_ps(0xffff, (__m512i)index, (__m512)table);
}

template <int N>
using Part __attribute__((vector_size(N * sizeof(float)))) = float;

template <int N>
Part<N> load_part(const float* from) {
  Part<N> part;
  std::memcpy(&part, from, sizeof(part));
  return part;
}

Part<8> join(Part<4> a, Part<4> b) {
  return __builtin_shufflevector(a, b, 0, 1, 2, 3, 4, 5, 6, 7);
}

Vector<float> join(Part<8> a, Part<8> b) {
  return __builtin_shufflevector(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
}

// A window of a grey image: four rows of four pixels, all in one table.
struct GreyWindow {
  static constexpr int passes = 1;
  Vector<float> table;

  GreyWindow(const float* x, int64_t row, int)
      : table(join(join(load_part<4>(x), load_part<4>(x + row)),
                   join(load_part<4>(x + 2 * row), load_part<4>(x + 3 * row)))) {}
  // Where the chosen patch begins in the table.
  static Indices origin(Indices choice) { return (choice & 1) + ((choice & 2) << 1); }
  Vector<float> tap(Indices from, int k) const { return look_up(table, from + (k / 3 * 4 + k % 3)); }
};

// Of a window of a colour image, the two rows that kernel row `pass` meets: for each kernel column a table of two
// pixels (and a bit) of either row.
struct ColourWindow {
  static constexpr int passes = 3;
  Vector<float> tables[3];

  ColourWindow(const float* x, int64_t row, int pass) {
    INNERLOOP_UNROLL
    for (int column = 0; column < 3; ++column) {
      const float* upper = x + pass * row + 3 * column;
      tables[column] = join(load_part<8>(upper), load_part<8>(upper + row));
    }
  }
  static Indices origin(Indices choice) { return (choice & 1) * 3 + ((choice & 2) << 2); }
  Vector<float> tap(Indices from, int k) const { return look_up(tables[k / 3], from + k % 3); }
};

constexpr int taps = 9;  // of a pass

template <class Window, int V>
void add_patches(const ChosenShape& shape, const float* x, const int32_t* choice, const float* dy, float* patches,
                 float* sums) {
  const int64_t step = 2 * shape.pixel;
  // With several passes a row of choices is read several times: row by row, it stays in the nearest cache.
  const int64_t strip = Window::passes == 1 ? shape.height : 1;
  for (int64_t first = 0; first < shape.height; first += strip) {
    for (int pass = 0; pass < Window::passes; ++pass) {
      Vector<float> of_patch[taps][V], total[V] = {};
      float* to = patches + pass * taps * shape.channels;
      INNERLOOP_UNROLL
      for (int k = 0; k < taps; ++k) {
        INNERLOOP_UNROLL
        for (int v = 0; v < V; ++v) of_patch[k][v] = load(to + k * shape.channels + v * L);
      }
      for (int64_t y = first; y < first + strip; ++y) {
        const float* window_at = x + 2 * y * shape.x_row;
        int64_t at = y * shape.width * shape.channels;
        for (int64_t column = 0; column < shape.width; ++column, at += shape.channels, window_at += step) {
          const Window window(window_at, shape.x_row, pass);
          INNERLOOP_UNROLL
          for (int v = 0; v < V; ++v) {
            const Indices chosen = load_choice(choice + at + v * L);
            const Vector<float> value = chosen >= 0 ? load(dy + at + v * L) : Vector<float>{};
            const Indices origin = Window::origin(chosen);
            total[v] += value;
            INNERLOOP_UNROLL
            for (int k = 0; k < taps; ++k) of_patch[k][v] += value * window.tap(origin, k);
          }
        }
      }
      INNERLOOP_UNROLL
      for (int k = 0; k < taps; ++k) {
        INNERLOOP_UNROLL
        for (int v = 0; v < V; ++v) store(to + k * shape.channels + v * L, of_patch[k][v]);
      }
      if (pass > 0) continue;
      for (int v = 0; v < V; ++v) store(sums + v * L, load(sums + v * L) + total[v]);
    }
  }
}

template <class Window>
void add_patches_of(const ChosenShape& shape, const float* x, const int32_t* choice, const float* dy, float* patches,
                    float* sums) {
  int64_t c = 0;
  for (; c + 2 * L <= shape.channels; c += 2 * L) {
    add_patches<Window, 2>(shape, x, choice + c, dy + c, patches + c, sums + c);
  }
  if (c < shape.channels) add_patches<Window, 1>(shape, x, choice + c, dy + c, patches + c, sums + c);
}

template <class Window>
void multiply_patches_of(const ChosenShape& shape, const float* x, const int32_t* choice, const float* w, float* z) {
  for (int64_t c = 0; c < shape.channels; c += L) {
    for (int64_t column = 0; column < shape.width; ++column) {
      const int64_t at = column * shape.channels + c;
      const Indices origin = Window::origin(load_choice(choice + at));
      Vector<float> sums[3] = {};
      INNERLOOP_UNROLL
      for (int pass = 0; pass < Window::passes; ++pass) {
        const Window window(x + 2 * column * shape.pixel, shape.x_row, pass);
        const float* weights = w + pass * taps * shape.channels + c;
        INNERLOOP_UNROLL
        for (int k = 0; k < taps; ++k) sums[k % 3] += window.tap(origin, k) * load(weights + k * shape.channels);
      }
      store(z + at, sums[0] + sums[1] + sums[2]);
    }
  }
}

}  // namespace

void add_chosen_patches(const ChosenShape& shape, const float* x, const int32_t* choice, const float* dy,
                        float* patches, float* sums) {
  if (shape.pixel == 1) {
    add_patches_of<GreyWindow>(shape, x, choice, dy, patches, sums);
  } else {
    add_patches_of<ColourWindow>(shape, x, choice, dy, patches, sums);
  }
}

void multiply_chosen_patches(const ChosenShape& shape, const float* x, const int32_t* choice, const float* w,
                             float* z) {
  if (shape.pixel == 1) {
    multiply_patches_of<GreyWindow>(shape, x, choice, w, z);
  } else {
    multiply_patches_of<ColourWindow>(shape, x, choice, w, z);
  }
}

}  // namespace innerloop::INNERLOOP_ISA
#endif
