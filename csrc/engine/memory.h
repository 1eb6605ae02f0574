// What the blocks executor takes from a worker's arena: arrays of zeros.
#pragma once

#include <algorithm>
#include <cstdint>

#include "engine/arena.h"

namespace innerloop::INNERLOOP_ISA {

template <class T>
class Memory {
 public:
  explicit Memory(Arena& arena) : arena_(arena) {}

  // count elements, all 0, with slack for one vector after them.
  T* take(int64_t count) {
    constexpr int64_t vector = 64 / sizeof(T);
    T* piece = arena_.take<T>(count + vector);
    std::fill_n(piece, count + vector, T(0));
    return piece;
  }

 private:
  Arena& arena_;
};

}  // namespace innerloop::INNERLOOP_ISA
