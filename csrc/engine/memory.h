// Zeroed, aligned memory for one worker, taken piece by piece and given back at once.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <vector>

#include "kernels/simd.h"

namespace innerloop::INNERLOOP_ISA {

template <class T>
class Memory {
 public:
  // count elements, all 0, with slack for one vector after them.
  T* take(int64_t count) {
    constexpr size_t alignment = 64;
    const size_t bytes = (static_cast<size_t>(count) * sizeof(T) + 2 * alignment - 1) / alignment * alignment;
    void* piece = std::aligned_alloc(alignment, bytes);
    if (piece == nullptr) throw std::bad_alloc();
    pieces_.emplace_back(piece);
    std::memset(piece, 0, bytes);
    return static_cast<T*>(piece);
  }

 private:
  struct Free {
    void operator()(void* piece) const { std::free(piece); }
  };
  std::vector<std::unique_ptr<void, Free>> pieces_;
};

}  // namespace innerloop::INNERLOOP_ISA
