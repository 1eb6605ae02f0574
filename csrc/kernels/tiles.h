// What the register tiles of the distances and of their gradient share.
#pragma once

#include <cstdint>

#include "kernels/simd.h"

namespace innerloop::INNERLOOP_ISA {

template <class T>
constexpr int64_t vectors_of(int64_t count) {
  return (count + lanes<T> - 1) / lanes<T>;
}

// Calls work(first row, rows) for tiles of at most R rows and as equal as can be: a small rest would leave the
// multiply-add units waiting.
template <int R, class Work>
void in_tiles(int64_t rows, const Work& work) {
  const int64_t tiles = (rows + R - 1) / R;
  for (int64_t t = 0; t < tiles; ++t) {
    const int64_t first = t * rows / tiles;
    work(first, (t + 1) * rows / tiles - first);
  }
}

}  // namespace innerloop::INNERLOOP_ISA
