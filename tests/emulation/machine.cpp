// The emulation itself: barriers, both kinds of shared memory, shuffles and atomics in one kernel, whose answer main
// checks. PLANT_RACE leaves a barrier out and PLANT_INDEX reads beyond shared memory, for the sanitizers to find; with
// PLANT_EXIT a thread leaves before a barrier.
#include <cuda_runtime.h>

#include <cstdio>
#include <vector>

namespace {

// out[row] = the sum of squares of x [rows, columns], one block a row; visits counts the blocks.
__global__ void sums_of_squares(const float* __restrict__ x, int64_t columns, float* __restrict__ out, int* visits) {
  float* tile = reinterpret_cast<float*>(emulation::shared_memory());
  __shared__ float of_warps[32];
  float sum = 0;
#if defined(PLANT_EXIT)
  if (threadIdx.x == 5) return;
#endif
  for (int64_t first = 0; first < columns; first += blockDim.x) {
    const int64_t column = first + threadIdx.x;
    tile[threadIdx.x] = column < columns ? x[blockIdx.x * columns + column] : 0;
    __syncthreads();
    // Another thread's element, so that the barriers are needed.
    const unsigned neighbour = (threadIdx.x + 33) % blockDim.x;
#if defined(PLANT_INDEX)
    sum += tile[neighbour + 1] * tile[neighbour + 1];
#else
    sum += tile[neighbour] * tile[neighbour];
#endif
#if !defined(PLANT_RACE)
    __syncthreads();
#endif
  }
  for (int distance = 16; distance > 0; distance /= 2) sum += __shfl_xor_sync(0xffffffff, sum, distance);
  if (threadIdx.x % 32 == 0) of_warps[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x >= 32) return;
  sum = threadIdx.x < blockDim.x / 32 ? of_warps[threadIdx.x] : 0;
  for (unsigned distance = 16; distance > 0; distance /= 2) sum += __shfl_down_sync(0xffffffff, sum, distance);
  if (threadIdx.x == 0) {
    out[blockIdx.x] = sum;
    atomicAdd(visits, 1);
  }
}

}  // namespace

int main() {
  constexpr int rows = 3, columns = 200;
  constexpr unsigned threads = 64;
  std::vector<float> x(rows * columns), out(rows);
  int visits = 0;
  for (size_t i = 0; i < x.size(); ++i) x[i] = static_cast<float>(i % 7);
  emulation::launch(rows, threads, threads * sizeof(float),
                    [&] { sums_of_squares(x.data(), columns, out.data(), &visits); });
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) {
    std::puts(cudaGetErrorString(error));
    return 1;
  }
  bool right = visits == rows;
  for (int row = 0; row < rows; ++row) {
    float expected = 0;
    for (int i = row * columns; i < (row + 1) * columns; ++i) expected += x[i] * x[i];
    right = right && out[row] == expected;  // sums of whole numbers are exact
  }
  for (const dim3& block : {dim3(257), dim3(32, 9), dim3(0), dim3(1, 1, 65)}) {
    emulation::launch(1, block, 0, [] { std::puts("ran"); });
    right = right && cudaGetLastError() == cudaErrorInvalidConfiguration;
  }
  emulation::launch(1, 1, (48 << 10) + 1, [] { std::puts("ran"); });
  right = right && cudaGetLastError() == cudaErrorInvalidConfiguration;
  std::puts(right ? "right" : "wrong");
  return right ? 0 : 1;
}
