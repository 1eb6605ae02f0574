// The arguments of svm_solve and svm_kkt_solve, and the errors of machines that have not converged.
#pragma once

#include "ops/checks.h"

namespace innerloop {

struct SvmSizes {
  int64_t tasks, samples, classes;
};

inline SvmSizes checked_svm_sizes(const Tensor& gram, const Tensor& labels, int64_t classes,
                                  const char* classes_name = "num_classes") {
  check_floating(gram, "gram");
  STD_TORCH_CHECK(gram.scalar_type() == ScalarType::Double, "gram must be float64");
  check_dims(gram, 3, "gram");
  check_dims(labels, 2, "labels");
  const int64_t tasks = gram.size(0), samples = gram.size(1);
  check_size(gram, 2, samples, "gram");
  STD_TORCH_CHECK(classes >= 1 && classes <= largest_size, classes_name, " is ", classes, ", expected 1 to ",
                  largest_size);
  int64_t elements = 0;
  STD_TORCH_CHECK(!__builtin_mul_overflow(samples * samples, classes, &elements) && elements < (int64_t{1} << 40),
                  "the systems of ", samples, " samples and ", classes, " classes would be too large");
  return {tasks, samples, classes};
}

inline SvmSizes checked_svm_kkt_sizes(const Tensor& right, const Tensor& gram, const Tensor& curvature,
                                      const Tensor& labels) {
  check_dims(right, 3, "right");
  const SvmSizes n = checked_svm_sizes(gram, labels, right.size(2), "the last size of right");
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
  return n;
}

// Of the tasks' residuals, iterations and whether they converged.
inline void check_converged(const double* residuals, const int64_t* iterations, const bool* converged, int64_t tasks,
                            int64_t max_iterations, double tolerance) {
  for (int64_t t = 0; t < tasks; ++t) {
    STD_TORCH_CHECK(residuals[t] == residuals[t], "the embeddings of task ", t,
                    " are not finite, or so large that their inner products are not");
    STD_TORCH_CHECK(converged[t], "the support vector machine of task ", t, " has not converged: after ", iterations[t],
                    " of at most ", max_iterations, " iterations its duality gap is ", residuals[t],
                    " of the objective, tolerance is ", tolerance,
                    ". Raise max_iterations or tolerance, or scale the embeddings down");
  }
}

// Of whether the tasks' systems had a solution.
inline void check_solved(const bool* solved, int64_t tasks) {
  for (int64_t t = 0; t < tasks; ++t) {
    STD_TORCH_CHECK(solved[t], "the KKT system of task ", t, " is singular or not finite");
  }
}

}  // namespace innerloop
