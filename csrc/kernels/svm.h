#pragma once

#include "kernels/isa.h"

namespace innerloop {

// One task of the Crammer-Singer support vector machine's dual
//
//   minimise ½ Σₖ αₖᵀ K αₖ − Σₛ α[s][yₛ]   subject to   Σₖ α[s][k] = 0,   α[s][k] ≤ C·(k = yₛ)
//
// with the Gram matrix K [samples, samples], labels y (-1: a sample that is not there) and α [samples, classes].
struct SvmProblem {
  const double* gram;
  const int64_t* labels;
  int64_t samples;
  int64_t classes;
};

struct SvmLimits {
  double c;
  int64_t max_iterations;
  double tolerance;  // of the residual
};

struct SvmReport {
  double residual;  // duality gap over the primal objective; NaN where the Gram matrix is not finite
  int64_t iterations;
  bool converged;  // to the tolerance, or to where only rounding is left of the gap
};

}  // namespace innerloop

// Solves it by a primal-dual interior-point method. dual and curvature are [samples, classes]; curvature is the
// multiplier of a bound over its slack, the KKT system's diagonal: 0 and ∞ up to rounding where a bound does not and
// does hold α. Absent samples have dual and curvature 0.
INNERLOOP_DECLARE(::innerloop::SvmReport svm_solve(const ::innerloop::SvmProblem& problem,
                                                   const ::innerloop::SvmLimits& limits, double* dual,
                                                   double* curvature))

// The KKT system at a solution, linearised: solution = argmin over δ with Σₖ δ[s][k] = 0 of
// ½ Σₖ δₖᵀ K δₖ + ½ Σ curvature δ² − Σ right δ. False where the system has no solution (values that are not finite).
INNERLOOP_DECLARE(bool svm_kkt_solve(const ::innerloop::SvmProblem& problem, const double* curvature,
                                     const double* right, double* solution))
