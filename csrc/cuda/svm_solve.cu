// svm_solve and svm_kkt_solve on CUDA: a block for each task, which iterates until its machine has converged. The
// errors of tasks without a solution wait for the device; in a CUDA graph their solution is NaN instead.
#include <algorithm>
#include <tuple>

#include "cuda/svm_machine.h"
#include "ops/svm_solve.h"

namespace innerloop {
namespace {

using svm::Gap;
using svm::InteriorPoint;
using svm::KktSystem;
using svm::Memory;
using svm::Problems;
using svm::Task;

constexpr size_t most_shared_bytes = 48 << 10;  // what every device has

constexpr double newton_ridge = 1e-12, derivative_ridge = 1e-9;

struct Limits {
  double c;
  int64_t max_iterations;
  double tolerance;
};

// [tasks, samples, classes], and a number for each task.
struct Solutions {
  double *dual, *curvature, *residuals;
  int64_t* iterations;
  bool* converged;
};

// The solutions of a task that has not converged are NaN.
__device__ void solve_task(const Problems& problems, const Limits& limits, const Solutions& to, int64_t t, Task& task,
                           InteriorPoint& point) {
  const int64_t first = t * problems.samples * problems.classes;
  double *dual = to.dual + first, *curvature = to.curvature + first;
  Gap gap{0, true};
  int64_t iterations = 0;
  bool converged = true;
  task.load(problems, t, limits.c);
  const bool is_there = task.n > 0 && task.classes > 1;
  if (is_there) {
    const double ridge = newton_ridge * task.largest_diagonal();
    point.start(task);
    while (true) {
      gap = point.gap(task);
      converged = gap.residual <= limits.tolerance || gap.rounding;
      if (converged || iterations == limits.max_iterations || !point.advance(task, ridge)) break;
      ++iterations;
    }
  }
  const double everywhere = converged ? 0 : static_cast<double>(NAN);
  by_block(problems.samples * problems.classes, [&](int64_t e) { dual[e] = curvature[e] = everywhere; });
  by_block(is_there && converged ? task.size() : 0, [&](int64_t e) {
    dual[task.outside(e)] = limits.c * point.a[e];
    curvature[task.outside(e)] = point.z[e] / (limits.c * point.s[e]);
  });
  if (threadIdx.x != 0) return;
  to.residuals[t] = gap.residual;
  to.iterations[t] = iterations;
  to.converged[t] = converged;
}

// Shared memory holds a number for each thread, and behind them a block's memory where scratch is null; else that is
// [blocks, size] there.
__device__ Memory memory_of_block(double* scratch, int64_t size) {
  return {scratch == nullptr ? shared_memory<double>() + blockDim.x : scratch + blockIdx.x * size};
}

__global__ void svm_solve_kernel(const Problems problems, const Limits limits, double* scratch, int64_t size,
                                 const Solutions to) {
  for (int64_t t = blockIdx.x; t < problems.tasks; t += gridDim.x) {
    Memory memory = memory_of_block(scratch, size);
    Task task(problems, memory);
    InteriorPoint point(problems, memory, shared_memory<double>());
    solve_task(problems, limits, to, t, task, point);
    __syncthreads();  // before the next task takes the place of this one
  }
}

// The solutions of a task whose system has none are NaN.
__global__ void svm_kkt_solve_kernel(const Problems problems, const double* right, const double* curvature,
                                     double* scratch, int64_t size, double* solutions, bool* solved) {
  for (int64_t t = blockIdx.x; t < problems.tasks; t += gridDim.x) {
    Memory memory = memory_of_block(scratch, size);
    Task task(problems, memory);
    KktSystem system(problems, memory);
    const int64_t elements = problems.samples * problems.classes;
    double* diagonal = memory.take(elements);
    double* wanted = memory.take(elements);
    double* x = memory.take(elements);
    double* nu = memory.take(problems.samples);
    double* solution = solutions + t * elements;
    task.load(problems, t, 1);
    bool is_solved = true;
    const bool is_there = task.n > 0 && task.classes > 1;
    if (is_there) {
      by_block(task.size(), [&](int64_t e) {
        diagonal[e] = curvature[t * elements + task.outside(e)];
        wanted[e] = right[t * elements + task.outside(e)];
      });
      is_solved = system.factorise(task, diagonal, derivative_ridge * task.largest_diagonal());
      if (is_solved) system.solve(task, wanted, x, nu, 3);
    }
    by_block(elements, [&](int64_t e) { solution[e] = is_solved ? 0 : static_cast<double>(NAN); });
    by_block(is_there && is_solved ? task.size() : 0, [&](int64_t e) { solution[task.outside(e)] = x[e]; });
    if (threadIdx.x == 0) solved[t] = is_solved;
    __syncthreads();  // before the next task takes the place of this one
  }
}

// Launches of a block for each task with so many doubles of memory: in shared memory, or where that is too small in
// scratch.
struct Launch {
  dim3 grid, block;
  size_t shared_bytes;
  Tensor scratch;
  double* memory;  // null: shared
  int64_t size;
};

Launch launch_for(const SvmSizes& n, const Tensor& like, int64_t size) {
  const dim3 grid = grid_for(n.tasks, 1);
  unsigned threads = 32;
  while (threads < threads_a_block && threads < n.samples * n.classes) threads *= 2;
  const size_t of_sums = threads * sizeof(double), both = of_sums + static_cast<size_t>(size) * sizeof(double);
  const bool in_shared = both <= most_shared_bytes;
  const Tensor scratch = torch::stable::new_empty(like, {in_shared ? 0 : int64_t{grid.x}, size}, ScalarType::Double);
  return {grid, threads, in_shared ? both : of_sums, scratch, in_shared ? nullptr : scratch.mutable_data_ptr<double>(),
          size};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> svm_solve_cuda(Tensor gram, Tensor labels, int64_t num_classes, double c,
                                                          int64_t max_iterations, double tolerance) {
  const SvmSizes n = checked_svm_sizes(gram, labels, num_classes);
  STD_TORCH_CHECK(c > 0, "C must be greater than 0");
  const Tensor k = torch::stable::contiguous(gram);
  const Tensor y = shaped_labels(labels, gram, n.tasks, n.samples);
  const Device device(k, "svm_solve");
  Tensor dual = torch::stable::new_empty(k, {n.tasks, n.samples, n.classes});
  Tensor curvature = torch::stable::empty_like(dual);
  Tensor residuals = torch::stable::new_empty(k, {n.tasks});
  Tensor iterations = torch::stable::new_empty(y, {n.tasks});
  const Tensor outcomes = torch::stable::new_empty(k, {n.tasks}, ScalarType::Bool);
  const Problems problems{k.const_data_ptr<double>(), y.const_data_ptr<int64_t>(), n.tasks, n.samples, n.classes};
  const Solutions to{dual.mutable_data_ptr<double>(), curvature.mutable_data_ptr<double>(),
                     residuals.mutable_data_ptr<double>(), iterations.mutable_data_ptr<int64_t>(),
                     outcomes.mutable_data_ptr<bool>()};
  Memory measured{nullptr};
  Task(problems, measured), InteriorPoint(problems, measured, nullptr);
  const Launch launch = launch_for(n, k, measured.used);
  device.launch(svm_solve_kernel, launch.grid, launch.block, launch.shared_bytes, problems,
                Limits{c, max_iterations, tolerance}, launch.memory, launch.size, to);
  if (!device.is_capturing()) {
    const HostCopy<bool> converged(device, to.converged, n.tasks);
    if (std::find(converged.begin(), converged.end(), false) != converged.end()) {
      check_converged(HostCopy<double>(device, to.residuals, n.tasks).begin(),
                      HostCopy<int64_t>(device, to.iterations, n.tasks).begin(), converged.begin(), n.tasks,
                      max_iterations, tolerance);
    }
  }
  return {dual, curvature, residuals, iterations};
}

Tensor svm_kkt_solve_cuda(Tensor right, Tensor gram, Tensor curvature, Tensor labels) {
  const SvmSizes n = checked_svm_kkt_sizes(right, gram, curvature, labels);
  const Tensor b = torch::stable::contiguous(right);
  const Tensor k = torch::stable::contiguous(gram);
  const Tensor d = torch::stable::contiguous(curvature);
  const Tensor y = shaped_labels(labels, gram, n.tasks, n.samples);
  const Device device(k, "svm_kkt_solve");
  Tensor out = torch::stable::empty_like(b);
  const Tensor outcomes = torch::stable::new_empty(k, {n.tasks}, ScalarType::Bool);
  const Problems problems{k.const_data_ptr<double>(), y.const_data_ptr<int64_t>(), n.tasks, n.samples, n.classes};
  Memory measured{nullptr};
  Task(problems, measured), KktSystem(problems, measured);
  measured.take(3 * n.samples * n.classes + n.samples);
  const Launch launch = launch_for(n, k, measured.used);
  device.launch(svm_kkt_solve_kernel, launch.grid, launch.block, launch.shared_bytes, problems,
                b.const_data_ptr<double>(), d.const_data_ptr<double>(), launch.memory, launch.size,
                out.mutable_data_ptr<double>(), outcomes.mutable_data_ptr<bool>());
  if (!device.is_capturing()) {
    check_solved(HostCopy<bool>(device, outcomes.const_data_ptr<bool>(), n.tasks).begin(), n.tasks);
  }
  return out;
}

}  // namespace
}  // namespace innerloop

INNERLOOP_CUDA_OPS(m) {
  m.impl("svm_solve", TORCH_BOX(&innerloop::svm_solve_cuda));
  m.impl("svm_kkt_solve", TORCH_BOX(&innerloop::svm_kkt_solve_cuda));
}
