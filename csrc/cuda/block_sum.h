// The sum over the threads of a block.
#pragma once

#include <cuda_runtime.h>

namespace innerloop {

// The sum of value over the threads of a block, a power of two of them, in an order that is always the same. Every
// thread gets it. memory is shared and holds a number for each thread.
__device__ inline double block_sum(double value, double* memory) {
  memory[threadIdx.x] = value;
  __syncthreads();
  for (unsigned half = blockDim.x / 2; half > 0; half /= 2) {
    if (threadIdx.x < half) memory[threadIdx.x] += memory[threadIdx.x + half];
    __syncthreads();
  }
  const double sum = memory[0];
  __syncthreads();
  return sum;
}

}  // namespace innerloop
