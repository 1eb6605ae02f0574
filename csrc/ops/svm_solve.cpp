// svm_solve: the dual of each task's Crammer-Singer support vector machine; svm_kkt_solve: its implicit derivative.
#include "ops/svm_solve.h"

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "kernels/svm.h"
#include "ops/parallel.h"

namespace innerloop {
namespace {

double operations(const SvmSizes& n) {
  return product(10, n.classes, n.samples, n.samples, n.samples + 10);
}

// (dual variables [T, S, N], the curvature that svm_kkt_solve asks for [T, S, N], residuals [T], iterations [T])
std::tuple<Tensor, Tensor, Tensor, Tensor> svm_solve_cpu(Tensor gram, Tensor labels, int64_t num_classes, double c,
                                                         int64_t max_iterations, double tolerance) {
  const SvmSizes n = checked_svm_sizes(gram, labels, num_classes);
  STD_TORCH_CHECK(c > 0, "C must be greater than 0");
  const Tensor k = torch::stable::contiguous(gram);
  const Tensor y = checked_labels(labels, gram, n.tasks, n.samples, n.classes);
  Tensor dual = torch::stable::new_empty(k, {n.tasks, n.samples, n.classes});
  Tensor curvature = torch::stable::empty_like(dual);
  Tensor residuals = torch::stable::new_empty(k, {n.tasks});
  Tensor iterations = torch::stable::new_empty(y, {n.tasks});
  const double* matrices = k.const_data_ptr<double>();
  const int64_t* label = y.const_data_ptr<int64_t>();
  double* to_dual = dual.mutable_data_ptr<double>();
  double* to_curvature = curvature.mutable_data_ptr<double>();
  double* residual = residuals.mutable_data_ptr<double>();
  int64_t* count = iterations.mutable_data_ptr<int64_t>();
  const Tensor outcomes = torch::stable::new_empty(k, {n.tasks}, ScalarType::Bool);
  bool* converged = outcomes.mutable_data_ptr<bool>();
  torch::stable::parallel_for(0, n.tasks, grain(operations(n)), [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const SvmProblem problem{matrices + t * n.samples * n.samples, label + t * n.samples, n.samples, n.classes};
      const int64_t first = t * n.samples * n.classes;
      const SvmReport report = INNERLOOP_CALL(svm_solve, problem, SvmLimits{c, max_iterations, tolerance},
                                              to_dual + first, to_curvature + first);
      residual[t] = report.residual;
      count[t] = report.iterations;
      converged[t] = report.converged;
    }
  });
  check_converged(residual, count, converged, n.tasks, max_iterations, tolerance);
  return {dual, curvature, residuals, iterations};
}

Tensor svm_kkt_solve_cpu(Tensor right, Tensor gram, Tensor curvature, Tensor labels) {
  const SvmSizes n = checked_svm_kkt_sizes(right, gram, curvature, labels);
  const Tensor b = torch::stable::contiguous(right);
  const Tensor k = torch::stable::contiguous(gram);
  const Tensor d = torch::stable::contiguous(curvature);
  const Tensor y = checked_labels(labels, gram, n.tasks, n.samples, n.classes);
  Tensor out = torch::stable::empty_like(b);
  const double* sides = b.const_data_ptr<double>();
  const double* matrices = k.const_data_ptr<double>();
  const double* diagonals = d.const_data_ptr<double>();
  const int64_t* label = y.const_data_ptr<int64_t>();
  double* solutions = out.mutable_data_ptr<double>();
  const Tensor outcomes = torch::stable::new_empty(k, {n.tasks}, ScalarType::Bool);
  bool* solved = outcomes.mutable_data_ptr<bool>();
  torch::stable::parallel_for(0, n.tasks, grain(operations(n)), [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const SvmProblem problem{matrices + t * n.samples * n.samples, label + t * n.samples, n.samples, n.classes};
      const int64_t first = t * n.samples * n.classes;
      solved[t] = INNERLOOP_CALL(svm_kkt_solve, problem, diagonals + first, sides + first, solutions + first);
    }
  });
  check_solved(solved, n.tasks);
  return out;
}

}  // namespace
}  // namespace innerloop

STABLE_TORCH_LIBRARY_FRAGMENT(innerloop, m) {
  m.def(
      "svm_solve(Tensor gram, Tensor labels, int num_classes, float C, int max_iterations, float tolerance) -> "
      "(Tensor, Tensor, Tensor, Tensor)");
  m.def("svm_kkt_solve(Tensor right, Tensor gram, Tensor curvature, Tensor labels) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(innerloop, CPU, m) {
  m.impl("svm_solve", TORCH_BOX(&innerloop::svm_solve_cpu));
  m.impl("svm_kkt_solve", TORCH_BOX(&innerloop::svm_kkt_solve_cpu));
}
