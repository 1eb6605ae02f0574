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
  if (tiles == 0) return;
  const int64_t height = rows / tiles, higher = rows % tiles;  // one division: they take as long as a small tile
  for (int64_t t = 0, first = 0; t < tiles; ++t) {
    const int64_t here = height + (t < higher);
    work(first, here);
    first += here;
  }
}

}  // namespace innerloop::INNERLOOP_ISA
