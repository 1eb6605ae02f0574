#include "kernels/svm.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "kernels/cholesky.h"
#include "kernels/simd.h"

namespace innerloop::INNERLOOP_ISA {
namespace {

using Doubles = std::vector<double>;

inline void add(double* __restrict to, const double* __restrict from, double factor, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] += factor * from[i];
}

inline double dot(const double* a, const double* b, int64_t count) {
  constexpr int L = lanes<double>;
  Vector<double> sums{};
  int64_t i = 0;
  for (; i + L <= count; i += L) sums += load(a + i) * load(b + i);
  double total = sum<double>(sums);
  for (; i < count; ++i) total += a[i] * b[i];
  return total;
}

// The samples of a task that are there, with everything that is [samples, classes] outside held class by class.
class Task {
 public:
  const int64_t classes;
  int64_t samples;
  Doubles gram;
  std::vector<int64_t> labels;

  explicit Task(const SvmProblem& problem) : classes(problem.classes), problem_(problem) {
    for (int64_t s = 0; s < problem.samples; ++s) {
      if (problem.labels[s] >= 0) rows_.push_back(s);
    }
    samples = static_cast<int64_t>(rows_.size());
    labels.resize(rows_.size());
    gram.resize(rows_.size() * rows_.size());
    for (int64_t i = 0; i < samples; ++i) {
      labels[i] = problem.labels[rows_[i]];
      for (int64_t j = 0; j < samples; ++j) gram[i * samples + j] = problem.gram[rows_[i] * problem.samples + rows_[j]];
    }
  }

  void gather(const double* from, double* to) const {
    for (int64_t i = 0; i < samples; ++i) {
      for (int64_t k = 0; k < classes; ++k) to[k * samples + i] = from[rows_[i] * classes + k];
    }
  }

  void scatter(const double* from, double* to) const {
    std::fill_n(to, problem_.samples * classes, 0.0);
    for (int64_t i = 0; i < samples; ++i) {
      for (int64_t k = 0; k < classes; ++k) to[rows_[i] * classes + k] = from[k * samples + i];
    }
  }

  // out[k] = K x[k]
  void multiply(const double* x, double* out) const {
    for (int64_t k = 0; k < classes; ++k) {
      for (int64_t i = 0; i < samples; ++i) {
        out[k * samples + i] = dot(gram.data() + i * samples, x + k * samples, samples);
      }
    }
  }

  double largest_diagonal() const {
    double largest = 0;
    for (int64_t i = 0; i < samples; ++i) largest = std::max(largest, gram[i * samples + i]);
    return largest;
  }

 private:
  const SvmProblem& problem_;
  std::vector<int64_t> rows_;
};

// The system (K + diag D[k]) x[k] + ν = b[k] for every class k, Σₖ x[k] = 0, which the classes share through ν
// [samples] alone: one factor of K + diag D[k] + ρ a class, and one of the Schur complement Σₖ (K + diag D[k] + ρ)⁻¹.
// The ridge ρ decides directions that K and D leave open; refinement takes its effect out of the others.
class KktSystem {
 public:
  explicit KktSystem(const Task& task)
      : task_(task),
        n_(task.samples),
        factors_(task.classes * n_ * n_),
        inverse_(n_ * n_),
        schur_(n_ * n_),
        part_(n_),
        product_(task.classes * n_),
        left_(task.classes * n_),
        left_sums_(n_) {}

  // D: curvature [classes, samples], which solve() reads too.
  bool factorise(const double* curvature, double ridge) {
    curvature_ = curvature;
    std::fill(schur_.begin(), schur_.end(), 0.0);
    for (int64_t k = 0; k < task_.classes; ++k) {
      double* factor = factors_.data() + k * n_ * n_;
      std::copy(task_.gram.begin(), task_.gram.end(), factor);
      for (int64_t i = 0; i < n_; ++i) factor[i * n_ + i] += curvature[k * n_ + i] + ridge;
      if (cholesky(factor, n_) < n_) return false;
      add_inverse(factor);
    }
    return cholesky(schur_.data(), n_) == n_;
  }

  // From b to x [classes, samples] and ν, in so many rounds of which the first solves and the others refine.
  void solve(const double* b, double* x, double* nu, int rounds) {
    std::fill_n(x, task_.classes * n_, 0.0);
    std::fill_n(nu, n_, 0.0);
    for (int round = 0; round < rounds; ++round) {
      task_.multiply(x, product_.data());
      std::fill(left_sums_.begin(), left_sums_.end(), 0.0);
      for (int64_t k = 0; k < task_.classes; ++k) {
        for (int64_t i = 0; i < n_; ++i) {
          const int64_t at = k * n_ + i;
          left_[at] = b[at] - product_[at] - curvature_[at] * x[at] - nu[i];
          left_sums_[i] -= x[at];
        }
      }
      solve_with_ridge(left_.data(), left_sums_.data());
      add(x, left_.data(), 1, task_.classes * n_);
      add(nu, left_sums_.data(), 1, n_);
    }
  }

 private:
  // Overwrites x, which holds b, with the solution; sums holds Σₖ x[k] and receives ν.
  void solve_with_ridge(double* x, double* sums) {
    for (int64_t i = 0; i < n_; ++i) sums[i] = -sums[i];
    for (int64_t k = 0; k < task_.classes; ++k) {
      solve_class(k, x + k * n_);
      add(sums, x + k * n_, 1, n_);
    }
    solve_vector(schur_.data(), sums);
    for (int64_t k = 0; k < task_.classes; ++k) {
      std::copy_n(sums, n_, part_.data());
      solve_class(k, part_.data());
      add(x + k * n_, part_.data(), -1, n_);
    }
  }

  // schur += (UᵀU)⁻¹, its upper triangle: VᵀV with the lower triangular V = U⁻ᵀ.
  void add_inverse(const double* u) {
    for (int64_t p = 0; p < n_; ++p) {
      double* row = inverse_.data() + p * n_;
      std::fill_n(row, p, 0.0);
      row[p] = 1;
      for (int64_t q = 0; q < p; ++q) add(row, inverse_.data() + q * n_, -u[q * n_ + p], q + 1);
      for (int64_t j = 0; j <= p; ++j) row[j] /= u[p * n_ + p];
      for (int64_t i = 0; i <= p; ++i) add(schur_.data() + i * n_ + i, row + i, row[i], p + 1 - i);
    }
  }

  void solve_class(int64_t k, double* x) const { solve_vector(factors_.data() + k * n_ * n_, x); }

  // By rows of U alone, both ways.
  void solve_vector(const double* u, double* x) const {
    for (int64_t k = 0; k < n_; ++k) {
      x[k] /= u[k * n_ + k];
      add(x + k + 1, u + k * n_ + k + 1, -x[k], n_ - k - 1);
    }
    for (int64_t k = n_ - 1; k >= 0; --k) {
      x[k] = (x[k] - dot(u + k * n_ + k + 1, x + k + 1, n_ - k - 1)) / u[k * n_ + k];
    }
  }

  const Task& task_;
  const int64_t n_;
  const double* curvature_ = nullptr;
  Doubles factors_, inverse_, schur_, part_, product_, left_, left_sums_;
};

// In units of C: a = α/C and the Gram matrix C·K, so that the slacks s = (k = y) − a of a sample sum up to 1. Every
// iterate is feasible: s > 0, Σₖ a = 0, and the multipliers z > 0 of the bounds.
class InteriorPoint {
 public:
  Doubles a, s, z;

  explicit InteriorPoint(const Task& task)
      : a(task.samples * task.classes),
        s(a.size()),
        z(a.size()),
        task_(task),
        n_(task.samples),
        size_(n_ * task.classes),
        system_(task),
        nu_(n_),
        gradient_(size_),
        curvature_(size_),
        wanted_(size_),
        step_(size_),
        step_z_(size_),
        step_nu_(n_) {
    start();
  }

  struct Gap {
    double residual;  // over the primal objective
    bool rounding;    // no more than rounding makes of a gap of 0
  };

  // Of a alone: whatever s and z are, no solution has an objective lower by more.
  Gap gap() {
    update_gradient();
    double gap = 0, objective = 0, rounding = 0;
    for (int64_t k = 0; k < task_.classes; ++k) {
      double terms = 0;  // of a gradient of this class, over its sample's norm
      for (int64_t i = 0; i < n_; ++i) terms += std::sqrt(task_.gram[i * n_ + i]) * std::fabs(a[k * n_ + i]);
      for (int64_t i = 0; i < n_; ++i) {
        const int64_t at = k * n_ + i;
        const double below = largest_[i] - gradient_[at];
        gap += s[at] * below;
        objective += a[at] * (gradient_[at] + is_label(k, i)) / 2 + is_label(k, i) * below;
        rounding += s[at] * (1 + std::sqrt(task_.gram[i * n_ + i]) * terms);
      }
    }
    return {gap == 0 ? 0 : gap / objective, gap <= 4 * std::numeric_limits<double>::epsilon() * rounding};
  }

  // A step of Mehrotra's predictor-corrector method. False where the system cannot be solved.
  bool advance(double ridge) {
    const double mu = complementarity(0);
    for (int64_t i = 0; i < size_; ++i) curvature_[i] = z[i] / s[i];
    if (!system_.factorise(curvature_.data(), ridge)) return false;
    for (int64_t i = 0; i < size_; ++i) step_z_[i] = -s[i] * z[i];
    newton();
    const double reduced = complementarity(longest_step()) / mu;
    const double target = reduced * reduced * reduced * mu;
    for (int64_t i = 0; i < size_; ++i) step_z_[i] = target - s[i] * z[i] + step_[i] * step_z_[i];
    newton();
    const double length = std::min(1.0, std::max(0.995, 1 - mu) * longest_step());
    for (int64_t i = 0; i < size_; ++i) {
      s[i] -= length * step_[i];
      z[i] += length * step_z_[i];
    }
    add(nu_.data(), step_nu_.data(), length, n_);
    take_slacks();
    return true;
  }

 private:
  double is_label(int64_t k, int64_t i) const { return task_.labels[i] == k ? 1 : 0; }

  // The slacks of a sample add up to 1 again, which rounding changes a little at each step, and a follows them: of the
  // label's class by the others' slacks, as its own may be too near 1 to tell a small a.
  void take_slacks() {
    for (int64_t i = 0; i < n_; ++i) {
      const int64_t label = task_.labels[i];
      double others = 0;
      for (int64_t k = 0; k < task_.classes; ++k) others += k == label ? 0 : s[k * n_ + i];
      const double total = others + s[label * n_ + i];
      for (int64_t k = 0; k < task_.classes; ++k) {
        s[k * n_ + i] /= total;
        a[k * n_ + i] = k == label ? others / total : -s[k * n_ + i];
      }
    }
  }

  void update_gradient() {
    task_.multiply(a.data(), gradient_.data());
    largest_.assign(n_, -std::numeric_limits<double>::infinity());
    for (int64_t k = 0; k < task_.classes; ++k) {
      for (int64_t i = 0; i < n_; ++i) {
        gradient_[k * n_ + i] -= is_label(k, i);
        largest_[i] = std::max(largest_[i], gradient_[k * n_ + i]);
      }
    }
  }

  // The best a along (k = y) − 1/N, and multipliers that make it optimal but for the complementarity s z = 0.
  void start() {
    const double share = 1 / static_cast<double>(task_.classes);
    for (int64_t k = 0; k < task_.classes; ++k) {
      for (int64_t i = 0; i < n_; ++i) a[k * n_ + i] = is_label(k, i) - share;
    }
    task_.multiply(a.data(), gradient_.data());
    const double bend = dot(a.data(), gradient_.data(), size_);
    const double slope = static_cast<double>(n_) * (1 - share);
    const double along = bend > slope ? slope / bend : 1;
    for (int64_t k = 0; k < task_.classes; ++k) {
      for (int64_t i = 0; i < n_; ++i) {
        a[k * n_ + i] *= along;
        s[k * n_ + i] = is_label(k, i) - a[k * n_ + i];
      }
    }
    update_gradient();
    double spread = 0;
    for (int64_t at = 0; at < size_; ++at) spread += largest_[at % n_] - gradient_[at];
    const double margin = spread > 0 ? spread / static_cast<double>(size_) : 1;
    for (int64_t i = 0; i < n_; ++i) nu_[i] = -largest_[i] - margin;
    for (int64_t at = 0; at < size_; ++at) z[at] = largest_[at % n_] + margin - gradient_[at];
  }

  // From what s z is to change by, in step_z_, to the steps.
  void newton() {
    for (int64_t k = 0; k < task_.classes; ++k) {
      for (int64_t i = 0; i < n_; ++i) {
        const int64_t at = k * n_ + i;
        wanted_[at] = -(gradient_[at] + z[at] + nu_[i]) - step_z_[at] / s[at];
      }
    }
    system_.solve(wanted_.data(), step_.data(), step_nu_.data(), 2);
    for (int64_t i = 0; i < size_; ++i) step_z_[i] = (step_z_[i] + z[i] * step_[i]) / s[i];
  }

  double longest_step() const {
    double length = 1e3;
    for (int64_t i = 0; i < size_; ++i) {
      if (step_[i] > 0) length = std::min(length, s[i] / step_[i]);
      if (step_z_[i] < 0) length = std::min(length, -z[i] / step_z_[i]);
    }
    return length;
  }

  // The mean of s z after a step of that length.
  double complementarity(double length) const {
    length = std::min(length, 1.0);
    double total = 0;
    for (int64_t i = 0; i < size_; ++i) total += (s[i] - length * step_[i]) * (z[i] + length * step_z_[i]);
    return total / static_cast<double>(size_);
  }

  const Task& task_;
  const int64_t n_, size_;
  KktSystem system_;
  Doubles nu_, gradient_, curvature_, wanted_, step_, step_z_, step_nu_, largest_;
};

// What is added to the diagonal of systems that may be singular, relative to the largest element of the Gram matrix's.
constexpr double newton_ridge = 1e-12, derivative_ridge = 1e-9;

}  // namespace

SvmReport svm_solve(const SvmProblem& problem, const SvmLimits& limits, double* dual, double* curvature) {
  Task task(problem);
  if (task.samples == 0 || task.classes == 1) {
    std::fill_n(dual, problem.samples * problem.classes, 0.0);
    std::fill_n(curvature, problem.samples * problem.classes, 0.0);
    return {0, 0, true};
  }
  for (double& element : task.gram) element *= limits.c;
  InteriorPoint point(task);
  const double ridge = newton_ridge * task.largest_diagonal();
  SvmReport report{0, 0, false};
  while (true) {
    const auto [residual, rounding] = point.gap();
    report.residual = residual;
    report.converged = residual <= limits.tolerance || rounding;
    if (report.converged || report.iterations == limits.max_iterations || !point.advance(ridge)) break;
    ++report.iterations;
  }
  Doubles ratio(point.a.size());
  for (size_t i = 0; i < ratio.size(); ++i) {
    ratio[i] = point.z[i] / (limits.c * point.s[i]);
    point.a[i] *= limits.c;
  }
  task.scatter(point.a.data(), dual);
  task.scatter(ratio.data(), curvature);
  return report;
}

bool svm_kkt_solve(const SvmProblem& problem, const double* curvature, const double* right, double* solution) {
  const Task task(problem);
  std::fill_n(solution, problem.samples * problem.classes, 0.0);
  if (task.samples == 0 || task.classes == 1) return true;
  const int64_t n = task.samples, size = n * task.classes;
  Doubles diagonal(size), wanted(size), x(size), nu(n);
  task.gather(curvature, diagonal.data());
  task.gather(right, wanted.data());
  KktSystem system(task);
  if (!system.factorise(diagonal.data(), derivative_ridge * task.largest_diagonal())) return false;
  system.solve(wanted.data(), x.data(), nu.data(), 3);
  task.scatter(x.data(), solution);
  return true;
}

}  // namespace innerloop::INNERLOOP_ISA
