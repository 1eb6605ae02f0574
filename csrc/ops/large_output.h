// Fresh outputs of many megabytes.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace innerloop {

inline int64_t bytes_of(const torch::stable::Tensor& tensor) {
  return tensor.numel() * static_cast<int64_t>(tensor.element_size());
}

// Whether an output is more than a core's share of the caches can hold, so that it is best written past them.
inline bool exceeds_caches(const torch::stable::Tensor& tensor) {
  return bytes_of(tensor) > int64_t{16} << 20;
}

// Asks for huge pages under a new output, where Linux leaves that to the program. The C library takes blocks beyond
// 32 MB from the system and gives them back each time, and a page fault for every 4 KB of a 38 MB gradient costs more
// than computing it.
inline void want_huge_pages([[maybe_unused]] torch::stable::Tensor& tensor) {
#if defined(__linux__)
  constexpr uintptr_t page = uintptr_t{1} << 21;
  const auto first = reinterpret_cast<uintptr_t>(tensor.mutable_data_ptr());
  const uintptr_t begin = (first + page - 1) / page * page;
  const uintptr_t end = (first + static_cast<uintptr_t>(bytes_of(tensor))) / page * page;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

}  // namespace innerloop
