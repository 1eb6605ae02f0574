// What the threads of a block do together: every one of them calls these, and each ends at a barrier.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace innerloop {

// Calls work(i) for i = 0 … count-1, each in one of the threads.
template <class Work>
__device__ void by_block(int64_t count, const Work& work) {
  for (int64_t i = threadIdx.x; i < count; i += blockDim.x) work(i);
  __syncthreads();
}

// The values of the threads of a block, a power of two of them, combined in an order that is always the same. Every
// thread gets the result. memory is shared and holds a number for each thread.
template <class Combine>
__device__ double block_reduce(double value, double* memory, const Combine& combine) {
  memory[threadIdx.x] = value;
  __syncthreads();
  for (unsigned half = blockDim.x / 2; half > 0; half /= 2) {
    if (threadIdx.x < half) memory[threadIdx.x] = combine(memory[threadIdx.x], memory[threadIdx.x + half]);
    __syncthreads();
  }
  const double all = memory[0];
  __syncthreads();
  return all;
}

__device__ inline double block_sum(double value, double* memory) {
  return block_reduce(value, memory, [](double a, double b) { return a + b; });
}

__device__ inline double block_min(double value, double* memory) {
  return block_reduce(value, memory, [](double a, double b) { return b < a ? b : a; });
}

}  // namespace innerloop
