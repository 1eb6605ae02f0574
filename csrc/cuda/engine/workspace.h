// Memory on a device.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <optional>

namespace innerloop::gpu {

// Free memory of the current device; nothing where it does not answer.
inline std::optional<int64_t> available_bytes() {
  size_t available = 0, total = 0;
  if (cudaMemGetInfo(&available, &total) != cudaSuccess) return std::nullopt;
  return static_cast<int64_t>(available);
}

// Hands out pieces of one block of memory; without one it counts.
class Workspace {
 public:
  explicit Workspace(void* memory = nullptr) : memory_(static_cast<char*>(memory)) {}

  template <class E>
  E* take(int64_t count) {
    constexpr int64_t alignment = 256;
    const int64_t begin = (bytes_ + alignment - 1) / alignment * alignment;
    bytes_ = begin + count * static_cast<int64_t>(sizeof(E));
    return memory_ == nullptr ? nullptr : reinterpret_cast<E*>(memory_ + begin);
  }

  int64_t bytes() const { return bytes_; }

 private:
  char* memory_;
  int64_t bytes_ = 0;
};

}  // namespace innerloop::gpu
