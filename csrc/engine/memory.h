// Zeroed, aligned memory for one worker, taken piece by piece and given back at once.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <vector>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "kernels/simd.h"

namespace innerloop::INNERLOOP_ISA {

template <class T>
class Memory {
 public:
  // count elements, all 0, with slack for one vector after them.
  T* take(int64_t count) {
    constexpr size_t vector = 64, huge_page = size_t{1} << 21;
    const size_t needed = static_cast<size_t>(count) * sizeof(T) + vector;
    const size_t alignment = needed >= huge_page ? huge_page : vector;
    const size_t bytes = (needed + alignment - 1) / alignment * alignment;
    void* piece = std::aligned_alloc(alignment, bytes);
    if (piece == nullptr) throw std::bad_alloc();
    pieces_.emplace_back(piece);
#if defined(MADV_HUGEPAGE)
    // A step touches hundreds of megabytes for the first time: in small pages, a fifth of its time goes into faults.
    if (alignment == huge_page) madvise(piece, bytes, MADV_HUGEPAGE);
#endif
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
