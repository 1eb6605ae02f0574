// svm_solve: the dual of each task's Crammer-Singer support vector machine; svm_kkt_solve: its implicit derivative.
#include <torch/csrc/stable/library.h>

#include <tuple>
#include <vector>

#include "kernels/svm.h"
#include "ops/checks.h"
#include "ops/parallel.h"

namespace innerloop {
namespace {

struct Sizes {
  int64_t tasks, samples, classes;

  int64_t operations() const { return 10 * classes * samples * samples * (samples + 10); }
};

Sizes checked_sizes(const Tensor& gram, const Tensor& labels, int64_t classes) {
  check_floating(gram, "gram");
  STD_TORCH_CHECK(gram.scalar_type() == ScalarType::Double, "gram must be float64");
  check_dims(gram, 3, "gram");
  check_dims(labels, 2, "labels");
  const int64_t tasks = gram.size(0), samples = gram.size(1);
  check_size(gram, 2, samples, "gram");
  STD_TORCH_CHECK(classes >= 1, "num_classes is ", classes, ", expected at least 1");
  int64_t elements = 0;
  STD_TORCH_CHECK(!__builtin_mul_overflow(samples * samples, classes, &elements) && elements < (int64_t{1} << 40),
                  "the systems of ", samples, " samples and ", classes, " classes would be too large");
  return {tasks, samples, classes};
}

// (dual variables [T, S, N], the curvature that svm_kkt_solve asks for [T, S, N], residuals [T], iterations [T])
std::tuple<Tensor, Tensor, Tensor, Tensor> svm_solve_cpu(Tensor gram, Tensor labels, int64_t num_classes, double c,
                                                         int64_t max_iterations, double tolerance) {
  const Sizes n = checked_sizes(gram, labels, num_classes);
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
  std::vector<char> converged(static_cast<size_t>(n.tasks));
  torch::stable::parallel_for(0, n.tasks, grain(n.operations()), [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const SvmProblem problem{matrices + t * n.samples * n.samples, label + t * n.samples, n.samples, n.classes};
      const int64_t first = t * n.samples * n.classes;
      const SvmReport report = INNERLOOP_CALL(svm_solve, problem, SvmLimits{c, max_iterations, tolerance},
                                              to_dual + first, to_curvature + first);
      residual[t] = report.residual;
      count[t] = report.iterations;
      converged[static_cast<size_t>(t)] = report.converged;
    }
  });
  for (int64_t t = 0; t < n.tasks; ++t) {
    STD_TORCH_CHECK(residual[t] == residual[t], "the embeddings of task ", t,
                    " are not finite, or so large that their inner products are not");
    STD_TORCH_CHECK(converged[static_cast<size_t>(t)], "the support vector machine of task ", t,
                    " has not converged: after ", count[t], " of at most ", max_iterations,
                    " iterations its duality gap is ", residual[t], " of the objective, tolerance is ", tolerance,
                    ". Raise max_iterations or tolerance, or scale the embeddings down");
  }
  return {dual, curvature, residuals, iterations};
}

Tensor svm_kkt_solve_cpu(Tensor right, Tensor gram, Tensor curvature, Tensor labels) {
  check_dims(right, 3, "right");
  const Sizes n = checked_sizes(gram, labels, right.size(2));
  check_same_type(right, gram, "right");
  check_same_type(curvature, gram, "curvature");
  check_floating(right, "right");
  check_floating(curvature, "curvature");
  check_dims(curvature, 3, "curvature");
  check_size(right, 0, n.tasks, "right");
  check_size(right, 1, n.samples, "right");
  check_size(curvature, 0, n.tasks, "curvature");
  check_size(curvature, 1, n.samples, "curvature");
  check_size(curvature, 2, n.classes, "curvature");
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
  std::vector<char> solved(static_cast<size_t>(n.tasks));
  torch::stable::parallel_for(0, n.tasks, grain(n.operations()), [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const SvmProblem problem{matrices + t * n.samples * n.samples, label + t * n.samples, n.samples, n.classes};
      const int64_t first = t * n.samples * n.classes;
      solved[static_cast<size_t>(t)] =
          INNERLOOP_CALL(svm_kkt_solve, problem, diagonals + first, sides + first, solutions + first);
    }
  });
  for (int64_t t = 0; t < n.tasks; ++t) {
    STD_TORCH_CHECK(solved[static_cast<size_t>(t)], "the KKT system of task ", t, " is singular or not finite");
  }
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
