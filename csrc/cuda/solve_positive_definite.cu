// solve_positive_definite on CUDA: a block for each task, whose threads factorise its matrix together, in shared memory
// where it fits, and solve with it. The error of a matrix that is not positive definite waits for the device; in a CUDA
// graph its solution is NaN instead.
#include "cuda/cholesky.h"
#include "ops/solve_positive_definite.h"

namespace innerloop {
namespace {

// Rows of a matrix of doubles that has room in 48 KiB, what every device has, with a row beside it.
constexpr int64_t largest_in_shared = 77;

// scratch [tasks, size + 1, size] holds the factors; null: shared memory does.
__global__ void solve_kernel(const double* matrices, const double* right, int64_t tasks, int64_t size, int64_t columns,
                             double* scratch, double* solutions, int64_t* reached) {
  for (int64_t t = blockIdx.x; t < tasks; t += gridDim.x) {
    double* factor = scratch == nullptr ? shared_memory<double>() : scratch + t * (size + 1) * size;
    double* inverses = factor + size * size;
    double* solution = solutions + t * size * columns;
    by_block(size * size, [&](int64_t e) { factor[e] = matrices[t * size * size + e]; });
    by_block(size * columns, [&](int64_t e) { solution[e] = right[t * size * columns + e]; });
    const int64_t rows = cholesky(factor, inverses, 1, size);
    if (rows == size) {
      cholesky_solve(factor, inverses, 1, size, solution, columns);
    } else {
      by_block(size * columns, [&](int64_t e) { solution[e] = static_cast<double>(NAN); });
    }
    if (threadIdx.x == 0) reached[t] = rows;
    __syncthreads();  // before the next task's matrix takes the place of this one's
  }
}

Tensor solve_positive_definite_cuda(Tensor matrix, Tensor right) {
  const Systems n = checked_systems(matrix, right);
  const Device device(n.matrix, "solve_positive_definite");
  Tensor out = torch::stable::empty_like(n.right);
  Tensor reached = torch::stable::new_empty(n.right, {n.tasks}, ScalarType::Long);
  const bool in_shared = n.size <= largest_in_shared;
  Tensor scratch = torch::stable::new_empty(n.right, {in_shared ? 0 : n.tasks, n.size + 1, n.size});
  device.launch(solve_kernel, grid_for(n.tasks, 1), threads_a_block,
                in_shared ? static_cast<size_t>((n.size + 1) * n.size) * sizeof(double) : 0,
                n.matrix.const_data_ptr<double>(), n.right.const_data_ptr<double>(), n.tasks, n.size, n.columns,
                in_shared ? nullptr : scratch.mutable_data_ptr<double>(), out.mutable_data_ptr<double>(),
                reached.mutable_data_ptr<int64_t>());
  if (!device.is_capturing()) {
    const HostCopy<int64_t> rows(device, reached.const_data_ptr<int64_t>(), n.tasks);
    check_reached(rows.begin(), n.tasks, n.size);
  }
  return out;
}

}  // namespace
}  // namespace innerloop

INNERLOOP_CUDA_OPS(m) {
  m.impl("solve_positive_definite", TORCH_BOX(&innerloop::solve_positive_definite_cuda));
}
