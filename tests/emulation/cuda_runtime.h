// CUDA's words for a C++ compiler: csrc/cuda, unchanged, becomes a library whose kernels run on the CPU. The blocks of
// a launch run one after another, and the threads of a block are fibers of one thread (fibers.h), of which sanitizers
// know. docs/cuda.md says what that shows and what not.
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <utility>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static  // blocks run one after another, so that one copy is enough

struct dim3 {
  unsigned x = 1, y = 1, z = 1;

  constexpr dim3(unsigned of_x = 1, unsigned of_y = 1, unsigned of_z = 1) : x(of_x), y(of_y), z(of_z) {}
};

// --- the run-time library -------------------------------------------------------------------------------------------

using cudaStream_t = void*;
enum cudaError_t {
  cudaSuccess,
  cudaErrorInvalidConfiguration,
  cudaErrorLaunchFailure,
  cudaErrorStreamCaptureUnsupported
};
enum cudaStreamCaptureStatus { cudaStreamCaptureStatusNone, cudaStreamCaptureStatusActive };
enum cudaMemcpyKind { cudaMemcpyHostToDevice, cudaMemcpyDeviceToHost, cudaMemcpyDeviceToDevice, cudaMemcpyDefault };

namespace emulation {
inline cudaError_t last_error = cudaSuccess;
inline std::string fault;  // what is behind cudaErrorLaunchFailure

// Whether the environment says that the stream is being captured into a graph. What is launched runs all the same, but
// waiting for it is an error.
inline bool is_capturing() {
  return std::getenv("EMULATION_CAPTURES") != nullptr;
}
}  // namespace emulation

inline cudaError_t cudaGetLastError() {
  return std::exchange(emulation::last_error, cudaSuccess);
}

inline const char* cudaGetErrorString(cudaError_t error) {
  if (error == cudaErrorInvalidConfiguration) return "invalid configuration argument";
  if (error == cudaErrorStreamCaptureUnsupported) return "operation not permitted when stream is capturing";
  return error == cudaErrorLaunchFailure ? emulation::fault.c_str() : "no error";
}

inline cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  *status = emulation::is_capturing() ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return cudaSuccess;
}

inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind, cudaStream_t) {
  if (kind != cudaMemcpyDeviceToDevice && emulation::is_capturing()) return cudaErrorStreamCaptureUnsupported;
  if (bytes > 0) std::memcpy(to, from, bytes);
  return cudaSuccess;
}

inline cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t) {
  if (bytes > 0) std::memset(to, value, bytes);
  return cudaSuccess;
}

inline cudaError_t cudaStreamSynchronize(cudaStream_t) {
  return emulation::is_capturing() ? cudaErrorStreamCaptureUnsupported : cudaSuccess;
}

inline cudaError_t cudaMemGetInfo(size_t* available, size_t* total) {
  if (std::getenv("EMULATION_LOST_DEVICE") != nullptr) return cudaErrorLaunchFailure;
  *available = *total = size_t{1} << 30;  // a small GPU
  return cudaSuccess;
}

// --- launches -------------------------------------------------------------------------------------------------------

inline dim3 blockIdx, blockDim, gridDim;

namespace emulation {

constexpr unsigned lanes = 32;  // of a warp
// Of a block. CUDA allows 1024, but a block has 65,536 registers and a kernel takes up to 255 for each thread: with 256
// threads no launch can fail for want of registers.
constexpr unsigned most_threads = 256;
constexpr size_t most_shared_bytes = 48 << 10;  // what a kernel has without asking for more

inline unsigned char* shared_bytes = nullptr;
inline uint64_t exchanged[most_threads];  // what each thread shows to its warp

inline unsigned char* shared_memory() {
  return shared_bytes;
}

inline dim3 index_of_thread(unsigned thread) {
  return dim3(thread % blockDim.x, thread / blockDim.x % blockDim.y, thread / (blockDim.x * blockDim.y));
}

}  // namespace emulation

#include "fibers.h"

namespace emulation {

inline bool fits(dim3 grid, dim3 block, size_t shared) {
  const auto in = [](unsigned value, uint64_t most) { return value >= 1 && value <= most; };
  return in(grid.x, 0x7fffffff) && in(grid.y, 65535) && in(grid.z, 65535) && in(block.x, 1024) && in(block.y, 1024) &&
         in(block.z, 64) && uint64_t{block.x} * block.y * block.z <= most_threads && shared <= most_shared_bytes;
}

// Whether the environment plants a fault in this launch: in the n-th one since it said that number, from 0.
inline bool is_to_fail() {
  static std::string since;
  static int launches;
  const char* number = std::getenv("EMULATION_FAILING_LAUNCH");
  if (since != (number == nullptr ? "" : number)) {
    since = number == nullptr ? "" : number;
    launches = 0;
  }
  return number != nullptr && launches++ == std::atoi(number);
}

inline void launch(dim3 grid, dim3 block, size_t shared, const std::function<void()>& kernel) {
  static std::mutex one_at_a_time;
  const std::lock_guard lock(one_at_a_time);
  if (is_to_fail() || !fits(grid, block, shared)) {
    last_error = cudaErrorInvalidConfiguration;
    return;
  }
  fault.clear();
  gridDim = grid;
  blockDim = block;
  for (unsigned z = 0; z < grid.z; ++z) {
    for (unsigned y = 0; y < grid.y; ++y) {
      for (unsigned x = 0; x < grid.x && fault.empty(); ++x) {
        blockIdx = dim3(x, y, z);
        // Of its exact size, for AddressSanitizer, and of bytes that make a float NaN: a block finds nothing there.
        const std::unique_ptr<void, void (*)(void*)> memory(std::malloc(shared), std::free);
        shared_bytes = static_cast<unsigned char*>(memory.get());
        if (shared > 0) std::memset(shared_bytes, 0xff, shared);
        run_block(block.x * block.y * block.z, kernel);
      }
    }
  }
  if (!fault.empty()) last_error = cudaErrorLaunchFailure;
}

inline unsigned own_thread() {
  return threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
}

// value of the lane `source` of this thread's warp, of whose lanes all take part.
template <class T>
T from_lane(unsigned mask, T value, unsigned source) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  const unsigned thread = own_thread(), warp = thread / lanes * lanes;
  if (mask != 0xffffffff || warp + lanes > blockDim.x * blockDim.y * blockDim.z) {
    fault = "emulation: a shuffle that not all 32 lanes of a warp take part in";
  }
  std::memcpy(&exchanged[thread], &value, sizeof(T));
  wait_for_warp();
  std::memcpy(&value, &exchanged[warp + source % lanes], sizeof(T));
  wait_for_warp();
  return value;
}

}  // namespace emulation

// --- what kernels call ----------------------------------------------------------------------------------------------

inline void __syncthreads() {
  emulation::wait_for_block();
}

inline void __syncwarp(unsigned = 0xffffffff) {
  emulation::wait_for_warp();
}

template <class T>
T __shfl_sync(unsigned mask, T value, int lane) {
  return emulation::from_lane(mask, value, static_cast<unsigned>(lane));
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits) {
  return emulation::from_lane(mask, value, emulation::own_thread() % emulation::lanes ^ static_cast<unsigned>(bits));
}

template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned distance) {
  const unsigned lane = emulation::own_thread() % emulation::lanes;
  return emulation::from_lane(mask, value, lane + distance < emulation::lanes ? lane + distance : lane);
}

template <class T>
T atomicAdd(T* to, T value) {
  return std::atomic_ref<T>(*to).fetch_add(value);
}

template <class T>
constexpr T min(T a, T b) {
  return b < a ? b : a;
}

template <class T>
constexpr T max(T a, T b) {
  return a < b ? b : a;
}

inline float rsqrt(float x) {
  return 1 / std::sqrt(x);
}

inline double rsqrt(double x) {
  return 1 / std::sqrt(x);
}
