// solve_positive_definite on CUDA: a block for each task, whose threads factorise its matrix together, in shared memory
// where it fits, and solve with it. The error of a matrix that is not positive definite waits for the device.
#include <limits>
#include <vector>

#include "cuda/launch.h"
#include "ops/solve_positive_definite.h"

namespace innerloop {
namespace {

constexpr double epsilon = std::numeric_limits<double>::epsilon();

constexpr int64_t largest_in_shared = 78;  // rows of a matrix of doubles in 48 KiB, what every device has

// The block's threads make u [n, n], of which the upper triangle counts, the factor of UᵀU. The row at which that
// fails, n if it goes through; every thread returns it.
__device__ int64_t cholesky(double* u, int64_t n) {
  const double rounding = static_cast<double>(n) * epsilon;
  for (int64_t k = 0; k < n; ++k) {
    double* row = u + k * n;
    double subtracted = 0;
    for (int64_t i = 0; i < k; ++i) subtracted += u[i * n + k] * u[i * n + k];
    const double pivot = row[k];
    // What is left of the diagonal must be more than rounding left there; comparisons with NaN are false.
    if (!(pivot > rounding * (pivot + subtracted)) || !(pivot < infinity<double>)) return k;
    const double scale = 1 / std::sqrt(pivot);
    __syncthreads();  // every thread has seen the pivot
    for (int64_t j = k + threadIdx.x; j < n; j += blockDim.x) row[j] *= scale;
    __syncthreads();
    const int64_t left = n - k - 1;
    for (int64_t e = threadIdx.x; e < left * left; e += blockDim.x) {
      const int64_t i = k + 1 + e / left, j = k + 1 + e % left;
      if (j >= i) u[i * n + j] -= row[i] * row[j];
    }
    __syncthreads();
  }
  return n;
}

// The block's threads make x [n, columns] (UᵀU)⁻¹ x.
__device__ void cholesky_solve(const double* u, int64_t n, double* x, int64_t columns) {
  for (int64_t k = 0; k < n; ++k) {
    for (int64_t j = threadIdx.x; j < columns; j += blockDim.x) x[k * columns + j] /= u[k * n + k];
    __syncthreads();
    for (int64_t e = threadIdx.x; e < (n - k - 1) * columns; e += blockDim.x) {
      const int64_t i = k + 1 + e / columns, j = e % columns;
      x[i * columns + j] -= u[k * n + i] * x[k * columns + j];
    }
    __syncthreads();
  }
  for (int64_t k = n - 1; k >= 0; --k) {
    for (int64_t j = threadIdx.x; j < columns; j += blockDim.x) x[k * columns + j] /= u[k * n + k];
    __syncthreads();
    for (int64_t e = threadIdx.x; e < k * columns; e += blockDim.x) {
      const int64_t i = e / columns, j = e % columns;
      x[i * columns + j] -= u[i * n + k] * x[k * columns + j];
    }
    __syncthreads();
  }
}

// scratch [tasks, size, size] holds the factors; null: shared memory does.
__global__ void solve_kernel(const double* matrices, const double* right, int64_t tasks, int64_t size, int64_t columns,
                             double* scratch, double* solutions, int64_t* reached) {
  for (int64_t t = blockIdx.x; t < tasks; t += gridDim.x) {
    double* factor = scratch == nullptr ? shared_memory<double>() : scratch + t * size * size;
    double* solution = solutions + t * size * columns;
    for (int64_t e = threadIdx.x; e < size * size; e += blockDim.x) factor[e] = matrices[t * size * size + e];
    for (int64_t e = threadIdx.x; e < size * columns; e += blockDim.x) solution[e] = right[t * size * columns + e];
    __syncthreads();
    const int64_t rows = cholesky(factor, size);
    if (rows == size) cholesky_solve(factor, size, solution, columns);
    if (threadIdx.x == 0) reached[t] = rows;
    __syncthreads();  // before the next task's matrix takes the place of this one's
  }
}

Tensor solve_positive_definite_cuda(Tensor matrix, Tensor right) {
  const Systems n = checked_systems(matrix, right);
  const Device device(n.matrix);
  Tensor out = torch::stable::empty_like(n.right);
  Tensor reached = torch::stable::new_empty(n.right, {n.tasks}, ScalarType::Long);
  const bool in_shared = n.size <= largest_in_shared;
  Tensor scratch = torch::stable::new_empty(n.right, {in_shared ? 0 : n.tasks, n.size, n.size});
  device.launch("solve_positive_definite", solve_kernel, grid_for(n.tasks, 1), threads_a_block,
                in_shared ? static_cast<size_t>(n.size * n.size) * sizeof(double) : 0,
                n.matrix.const_data_ptr<double>(), n.right.const_data_ptr<double>(), n.tasks, n.size, n.columns,
                in_shared ? nullptr : scratch.mutable_data_ptr<double>(), out.mutable_data_ptr<double>(),
                reached.mutable_data_ptr<int64_t>());
  std::vector<int64_t> rows(static_cast<size_t>(n.tasks));
  check_cuda(cudaMemcpyAsync(rows.data(), reached.const_data_ptr<int64_t>(), rows.size() * sizeof(int64_t),
                             cudaMemcpyDeviceToHost, device.stream()),
             "solve_positive_definite");
  check_cuda(cudaStreamSynchronize(device.stream()), "solve_positive_definite");
  check_reached(rows.data(), n.tasks, n.size);
  return out;
}

}  // namespace
}  // namespace innerloop

INNERLOOP_CUDA_OPS(m) {
  m.impl("solve_positive_definite", TORCH_BOX(&innerloop::solve_positive_definite_cuda));
}
