// The way from an op's host code to its kernels, and all that differs between the two compilers of csrc/cuda: nvcc
// makes the ops of CUDA tensors; g++ makes the same ops of CPU tensors for the tests, whose cuda_runtime.h runs the
// blocks of a launch on the CPU (tests/emulation, docs/cuda.md).
#pragma once

#include <cuda_runtime.h>
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <memory>
#include <type_traits>

// Opens the block that registers a file's kernels: INNERLOOP_CUDA_OPS(m) { m.impl(…); }
#if defined(__CUDACC__)
#define INNERLOOP_CUDA_OPS(m) STABLE_TORCH_LIBRARY_IMPL(innerloop, CUDA, m)
#else
#define INNERLOOP_CUDA_OPS(m) STABLE_TORCH_LIBRARY_IMPL(innerloop_emulated, CPU, m)
#endif

namespace innerloop {

constexpr int threads_a_block = 256;

// Device code may read constants, but not call the functions of std::numeric_limits.
template <class T>
constexpr T infinity = std::numeric_limits<T>::infinity();

// Blocks for so many items, each taken by one thread, or by a whole block where a block holds one. There may be more
// items than blocks: kernels go through theirs in strides of the grid.
inline dim3 grid_for(int64_t items, int64_t items_a_block = threads_a_block) {
  constexpr int64_t most_blocks = 65535;
  return dim3(static_cast<unsigned>(std::min((items + items_a_block - 1) / items_a_block, most_blocks)));
}

// The memory that the threads of a block share, as large as the launch said.
template <class T>
__device__ T* shared_memory() {
#if defined(__CUDACC__)
  extern __shared__ __align__(16) unsigned char bytes[];
#else
  unsigned char* bytes = emulation::shared_memory();
#endif
  return reinterpret_cast<T*>(bytes);
}

#if !defined(STABLE_TORCH_ERROR_CODE_CHECK)  // torch's headers have it since 2.13
#define STABLE_TORCH_ERROR_CODE_CHECK TORCH_ERROR_CODE_CHECK
#endif

#if defined(__CUDACC__)
inline cudaStream_t current_stream(int32_t device) {
#if TORCH_TARGET_VERSION >= 0x020d000000000000ULL
  return static_cast<cudaStream_t>(torch::stable::accelerator::getCurrentStream(device).nativeHandle());
#else
  // An older stable ABI has it for torch's CUDA builds alone: found where torch has loaded it, and not linked, so that
  // this library can be built, and looked at, beside a CPU build.
  using Function = AOTITorchError (*)(int32_t, void**);
  static const auto of_device = [] {
    void* const library = dlopen("libtorch_cuda.so", RTLD_NOW | RTLD_NOLOAD);
    void* const symbol = library == nullptr ? nullptr : dlsym(library, "aoti_torch_get_current_cuda_stream");
    STD_TORCH_CHECK(symbol != nullptr, "this torch has no aoti_torch_get_current_cuda_stream in a libtorch_cuda.so");
    return reinterpret_cast<Function>(symbol);
  }();
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(of_device(device, &stream));
  return static_cast<cudaStream_t>(stream);
#endif
}
#endif

// The device that a tensor is on: current as long as this lives, with torch's current stream there. Errors of what is
// done on it name op.
class Device {
 public:
#if defined(__CUDACC__)
  Device(const torch::stable::Tensor& tensor, const char* op)
      : guard_(tensor.get_device_index()),
        place_(tensor.device()),
        op_(op),
        stream_(current_stream(tensor.get_device_index())) {}
#else
  Device(const torch::stable::Tensor& tensor, const char* op) : place_(tensor.device()), op_(op), stream_(nullptr) {}
#endif

  torch::stable::Device place() const { return place_; }
  const char* op() const { return op_; }
  cudaStream_t stream() const { return stream_; }

  // Whether what is started becomes a part of a CUDA graph instead of running: the host cannot wait for it then.
  bool is_capturing() const {
    cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
    return cudaStreamIsCapturing(stream_, &status) == cudaSuccess && status != cudaStreamCaptureStatusNone;
  }

  // Starts a kernel on the stream. A grid without blocks is no launch.
  template <class... Parameters>
  void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes,
              std::type_identity_t<Parameters>... arguments) const {
    if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
#if defined(__CUDACC__)
    kernel<<<grid, block, shared_bytes, stream_>>>(arguments...);
#else
    emulation::launch(grid, block, shared_bytes, [&] { kernel(arguments...); });
#endif
    check(cudaGetLastError());
  }

  void check(cudaError_t error) const { STD_TORCH_CHECK(error == cudaSuccess, op_, ": ", cudaGetErrorString(error)); }

 private:
#if defined(__CUDACC__)
  torch::stable::accelerator::DeviceGuard guard_;
#endif
  torch::stable::Device place_;
  const char* op_;
  cudaStream_t stream_;
};

// The numbers of an array on the device, for which the host waits.
template <class E>
class HostCopy {
 public:
  HostCopy(const Device& device, const E* data, int64_t count)
      : count_(count), copy_(new E[static_cast<size_t>(count)]) {
    const size_t bytes = static_cast<size_t>(count) * sizeof(E);
    device.check(cudaMemcpyAsync(copy_.get(), data, bytes, cudaMemcpyDeviceToHost, device.stream()));
    device.check(cudaStreamSynchronize(device.stream()));
  }

  const E* begin() const { return copy_.get(); }
  const E* end() const { return copy_.get() + count_; }

 private:
  const int64_t count_;
  const std::unique_ptr<E[]> copy_;
};

}  // namespace innerloop
