// One task's support vector machine on CUDA, solved by the threads of a block together. The algorithm is that of
// kernels/svm.cpp, in the same words, and is explained there; here is how the threads share it out.
#pragma once

#include <cmath>

#include "cuda/block.h"
#include "cuda/cholesky.h"

namespace innerloop::svm {

// Hands out a block's memory piece by piece; without any it counts.
struct Memory {
  double* data;
  int64_t used = 0;

  __host__ __device__ double* take(int64_t count) {
    double* taken = data == nullptr ? nullptr : data + used;
    used += count;
    return taken;
  }
};

// Of all tasks.
struct Problems {
  const double* gram;     // [tasks, samples, samples]
  const int64_t* labels;  // [tasks, samples]
  int64_t tasks, samples, classes;
};

// The samples of a task that are there, with everything that is [samples, classes] outside held class by class: element
// e = k·n + i is of class k and sample i.
struct Task {
  int64_t n, classes;
  double* gram;
  int64_t *labels, *rows;

  __host__ __device__ Task(const Problems& problems, Memory& memory)
      : n(problems.samples),
        classes(problems.classes),
        gram(memory.take(n * n)),
        labels(reinterpret_cast<int64_t*>(memory.take(n))),
        rows(reinterpret_cast<int64_t*>(memory.take(n))) {}

  __device__ void load(const Problems& problems, int64_t t, double scale) {
    const int64_t samples = problems.samples;
    n = 0;
    for (int64_t s = 0; s < samples; ++s) {  // every thread, to know n
      const int64_t label = problems.labels[t * samples + s];
      if (label < 0 || label >= classes) continue;
      if (threadIdx.x == 0) {
        rows[n] = s;
        labels[n] = label;
      }
      ++n;
    }
    __syncthreads();
    by_block(n * n,
             [&](int64_t e) { gram[e] = scale * problems.gram[(t * samples + rows[e / n]) * samples + rows[e % n]]; });
  }

  __device__ int64_t size() const { return n * classes; }
  __device__ int64_t outside(int64_t e) const { return rows[e % n] * classes + e / n; }
  __device__ double is_label(int64_t e) const { return labels[e % n] == e / n ? 1 : 0; }

  // Element e of K x[k] for every class; K is symmetric.
  __device__ double product(const double* x, int64_t e) const {
    const int64_t i = e % n, first = e - i;
    double sum = 0;
    for (int64_t j = 0; j < n; ++j) sum += gram[j * n + i] * x[first + j];
    return sum;
  }

  __device__ double sum_over_classes(const double* x, int64_t i) const {
    double sum = 0;
    for (int64_t k = 0; k < classes; ++k) sum += x[k * n + i];
    return sum;
  }

  __device__ double largest_diagonal() const {
    double largest = 0;
    for (int64_t i = 0; i < n; ++i) largest = max(largest, gram[i * n + i]);
    return largest;
  }
};

// (K + diag D[k]) x[k] + ν = b[k] for every class k, Σₖ x[k] = 0. All classes are factorised together.
struct KktSystem {
  double *factors, *inverses;  // [classes, n, n]: U, and U⁻ᵀ
  double *schur, *part, *left, *left_sums;
  double *factor_scales, *schur_scales;  // 1 over the diagonals of the factors
  const double* curvature;

  __host__ __device__ KktSystem(const Problems& p, Memory& memory)
      : factors(memory.take(p.classes * p.samples * p.samples)),
        inverses(memory.take(p.classes * p.samples * p.samples)),
        schur(memory.take(p.samples * p.samples)),
        part(memory.take(p.classes * p.samples)),
        left(memory.take(p.classes * p.samples)),
        left_sums(memory.take(p.samples)),
        factor_scales(memory.take(p.classes * p.samples)),
        schur_scales(memory.take(p.samples)),
        curvature(nullptr) {}

  __device__ bool factorise(const Task& task, const double* of_bounds, double ridge) {
    const int64_t n = task.n, classes = task.classes;
    curvature = of_bounds;
    by_block(classes * n * n, [&](int64_t e) {
      const int64_t i = e / n % n, j = e % n;
      factors[e] = task.gram[i * n + j] + (i == j ? curvature[e / n] + ridge : 0);
    });
    if (cholesky(factors, factor_scales, classes, n) < n) return false;
    // A thread for each column of U⁻ᵀ, from the diagonal down.
    by_block(classes * n, [&](int64_t e) {
      const int64_t j = e % n;
      const double* u = factors + e / n * n * n;
      double* column = inverses + e / n * n * n + j;
      for (int64_t p = j; p < n; ++p) {
        double sum = p == j ? 1 : 0;
        for (int64_t q = j; q < p; ++q) sum -= u[q * n + p] * column[q * n];
        column[p * n] = sum * factor_scales[e - j + p];
      }
    });
    by_block(n * n, [&](int64_t e) {
      const int64_t i = e / n, j = e % n;
      double sum = 0;
      for (int64_t k = 0; k < classes && j >= i; ++k) {
        const double* rows = inverses + k * n * n;
        for (int64_t p = j; p < n; ++p) sum += rows[p * n + i] * rows[p * n + j];
      }
      schur[e] = sum;
    });
    return cholesky(schur, schur_scales, 1, n) == n;
  }

  __device__ void solve(const Task& task, const double* b, double* x, double* nu, int rounds) {
    by_block(task.size(), [&](int64_t e) { x[e] = 0; });
    by_block(task.n, [&](int64_t i) { nu[i] = 0; });
    for (int round = 0; round < rounds; ++round) {
      by_block(task.size(),
               [&](int64_t e) { left[e] = b[e] - task.product(x, e) - curvature[e] * x[e] - nu[e % task.n]; });
      by_block(task.n, [&](int64_t i) { left_sums[i] = task.sum_over_classes(x, i); });
      solve_with_ridge(task);
      by_block(task.size(), [&](int64_t e) { x[e] += left[e]; });
      by_block(task.n, [&](int64_t i) { nu[i] += left_sums[i]; });
    }
  }

  // left becomes the solution for it, given that −left_sums is what its classes are to add up to; left_sums becomes ν.
  __device__ void solve_with_ridge(const Task& task) {
    cholesky_solve(factors, factor_scales, task.classes, task.n, left, 1);
    by_block(task.n, [&](int64_t i) { left_sums[i] += task.sum_over_classes(left, i); });
    cholesky_solve(schur, schur_scales, 1, task.n, left_sums, 1);
    by_block(task.size(), [&](int64_t e) { part[e] = left_sums[e % task.n]; });
    cholesky_solve(factors, factor_scales, task.classes, task.n, part, 1);
    by_block(task.size(), [&](int64_t e) { left[e] -= part[e]; });
  }
};

struct Gap {
  double residual;
  bool rounding;
};

struct InteriorPoint {
  KktSystem system;
  double *a, *s, *z, *gradient, *curvature, *wanted, *step, *step_z;  // [classes, n]
  double *nu, *step_nu, *largest, *terms;
  double* sums;  // a number for each thread of the block, in shared memory

  __host__ __device__ InteriorPoint(const Problems& p, Memory& memory, double* memory_of_sums)
      : system(p, memory),
        a(memory.take(p.classes * p.samples)),
        s(memory.take(p.classes * p.samples)),
        z(memory.take(p.classes * p.samples)),
        gradient(memory.take(p.classes * p.samples)),
        curvature(memory.take(p.classes * p.samples)),
        wanted(memory.take(p.classes * p.samples)),
        step(memory.take(p.classes * p.samples)),
        step_z(memory.take(p.classes * p.samples)),
        nu(memory.take(p.samples)),
        step_nu(memory.take(p.samples)),
        largest(memory.take(p.samples)),
        terms(memory.take(p.classes)),
        sums(memory_of_sums) {}

  // Σ value(e) over the elements of all classes.
  template <class Value>
  __device__ double total(const Task& task, const Value& value) const {
    double sum = 0;
    for (int64_t e = threadIdx.x; e < task.size(); e += blockDim.x) sum += value(e);
    return block_sum(sum, sums);
  }

  __device__ void start(const Task& task) {
    const double share = 1 / static_cast<double>(task.classes);
    by_block(task.size(), [&](int64_t e) {
      a[e] = task.is_label(e) - share;
      step[e] = step_z[e] = 0;
    });
    const double bend = total(task, [&](int64_t e) { return a[e] * task.product(a, e); });
    const double slope = static_cast<double>(task.n) * (1 - share);
    const double along = bend > slope ? slope / bend : 1;
    by_block(task.size(), [&](int64_t e) {
      a[e] *= along;
      s[e] = task.is_label(e) - a[e];
    });
    update_gradient(task);
    const double spread = total(task, [&](int64_t e) { return largest[e % task.n] - gradient[e]; });
    const double margin = spread > 0 ? spread / static_cast<double>(task.size()) : 1;
    by_block(task.n, [&](int64_t i) { nu[i] = -largest[i] - margin; });
    by_block(task.size(), [&](int64_t e) { z[e] = largest[e % task.n] + margin - gradient[e]; });
  }

  __device__ void update_gradient(const Task& task) {
    by_block(task.size(), [&](int64_t e) { gradient[e] = task.product(a, e) - task.is_label(e); });
    by_block(task.n, [&](int64_t i) {
      double most = -infinity<double>;
      for (int64_t k = 0; k < task.classes; ++k) most = max(most, gradient[k * task.n + i]);
      largest[i] = most;
    });
  }

  __device__ Gap gap(const Task& task) {
    const int64_t n = task.n;
    const auto norm = [&](int64_t i) { return std::sqrt(task.gram[i * n + i]); };
    const auto below = [&](int64_t e) { return largest[e % n] - gradient[e]; };
    update_gradient(task);
    by_block(task.classes, [&](int64_t k) {
      double sum = 0;
      for (int64_t i = 0; i < n; ++i) sum += norm(i) * std::fabs(a[k * n + i]);
      terms[k] = sum;
    });
    const double gap = total(task, [&](int64_t e) { return s[e] * below(e); });
    const double objective = total(
        task, [&](int64_t e) { return a[e] * (gradient[e] + task.is_label(e)) / 2 + task.is_label(e) * below(e); });
    const double rounding = total(task, [&](int64_t e) { return s[e] * (1 + norm(e % n) * terms[e / n]); });
    return {gap == 0 ? 0 : gap / objective, gap <= 4 * epsilon * rounding};
  }

  __device__ bool advance(const Task& task, double ridge) {
    const double mu = complementarity(task, 0);
    by_block(task.size(), [&](int64_t e) { curvature[e] = z[e] / s[e]; });
    if (!system.factorise(task, curvature, ridge)) return false;
    by_block(task.size(), [&](int64_t e) { step_z[e] = -s[e] * z[e]; });
    newton(task);
    const double reduced = complementarity(task, longest_step(task)) / mu;
    const double target = reduced * reduced * reduced * mu;
    by_block(task.size(), [&](int64_t e) { step_z[e] = target - s[e] * z[e] + step[e] * step_z[e]; });
    newton(task);
    const double length = min(1.0, max(0.995, 1 - mu) * longest_step(task));
    by_block(task.size(), [&](int64_t e) {
      s[e] -= length * step[e];
      z[e] += length * step_z[e];
    });
    by_block(task.n, [&](int64_t i) {
      nu[i] += length * step_nu[i];
      take_slacks(task, i);
    });
    return true;
  }

  __device__ void take_slacks(const Task& task, int64_t i) {
    const int64_t n = task.n, label = task.labels[i];
    double others = 0;
    for (int64_t k = 0; k < task.classes; ++k) others += k == label ? 0 : s[k * n + i];
    const double all = others + s[label * n + i];
    for (int64_t k = 0; k < task.classes; ++k) {
      s[k * n + i] /= all;
      a[k * n + i] = k == label ? others / all : -s[k * n + i];
    }
  }

  __device__ void newton(const Task& task) {
    by_block(task.size(), [&](int64_t e) { wanted[e] = -(gradient[e] + z[e] + nu[e % task.n]) - step_z[e] / s[e]; });
    system.solve(task, wanted, step, step_nu, 2);
    by_block(task.size(), [&](int64_t e) { step_z[e] = (step_z[e] + z[e] * step[e]) / s[e]; });
  }

  __device__ double longest_step(const Task& task) const {
    double length = 1e3;
    for (int64_t e = threadIdx.x; e < task.size(); e += blockDim.x) {
      if (step[e] > 0) length = min(length, s[e] / step[e]);
      if (step_z[e] < 0) length = min(length, -z[e] / step_z[e]);
    }
    return block_min(length, sums);
  }

  __device__ double complementarity(const Task& task, double length) const {
    length = min(length, 1.0);
    const double sum = total(task, [&](int64_t e) { return (s[e] - length * step[e]) * (z[e] + length * step_z[e]); });
    return sum / static_cast<double>(task.size());
  }
};

}  // namespace innerloop::svm
