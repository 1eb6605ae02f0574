// solve_positive_definite: the symmetric positive definite system of each task, by Cholesky.
#include "ops/solve_positive_definite.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <vector>

#include "kernels/cholesky.h"
#include "ops/parallel.h"

namespace innerloop {
namespace {

// [T, M, N] float64: matrix⁻¹ right, of matrix [T, M, M] (its upper triangle counts) and right [T, M, N].
Tensor solve_positive_definite_cpu(Tensor matrix, Tensor right) {
  const auto [a, b, tasks, size, columns] = checked_systems(matrix, right);
  Tensor out = torch::stable::empty_like(b);
  const double* given = a.const_data_ptr<double>();
  const double* sides = b.const_data_ptr<double>();
  double* solutions = out.mutable_data_ptr<double>();
  std::vector<int64_t> reached(static_cast<size_t>(tasks), size);
  const double operations = product(size, size, size) / 3 + product(2, size, size, columns);
  torch::stable::parallel_for(0, tasks, grain(operations), [&](int64_t begin, int64_t end) {
    std::vector<double> factor(static_cast<size_t>(size * size));
    for (int64_t t = begin; t < end; ++t) {
      std::copy_n(given + t * size * size, size * size, factor.data());
      double* solution = std::copy_n(sides + t * size * columns, size * columns, solutions + t * size * columns);
      solution -= size * columns;
      int64_t& rows = reached[static_cast<size_t>(t)];
      rows = INNERLOOP_CALL(cholesky, factor.data(), size);
      if (rows == size) INNERLOOP_CALL(cholesky_solve, factor.data(), size, solution, columns);
    }
  });
  check_reached(reached.data(), tasks, size);
  return out;
}

}  // namespace
}  // namespace innerloop

STABLE_TORCH_LIBRARY_FRAGMENT(innerloop, m) {
  m.def("solve_positive_definite(Tensor matrix, Tensor right) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(innerloop, CPU, m) {
  m.impl("solve_positive_definite", TORCH_BOX(&innerloop::solve_positive_definite_cpu));
}
