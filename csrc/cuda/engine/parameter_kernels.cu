#include <algorithm>

#include "cuda/block.h"
#include "cuda/engine/each.h"
#include "cuda/engine/parameter_kernels.h"

namespace innerloop::gpu {
namespace {

constexpr size_t operands_a_launch = 48;  // 48 × 56 bytes of kernel arguments, within the 4 KiB that a launch may pass

template <class T>
struct Batch {
  Operand<T> each[operands_a_launch];
};

// blockIdx.y is the operand; the blocks of x stride over its elements.
template <class T, class Operation>
__global__ void operands_kernel(const Batch<T> batch, const int64_t tasks, const Operation operation) {
  const Operand<T> operand = batch.each[blockIdx.y];
  const int64_t step = int64_t{blockDim.x} * gridDim.x, count = tasks * operand.size;
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < count; i += step) operation(operand, i);
}

// Calls work(operands as a kernel takes them, their number, the number of those before them, the largest size).
template <class T, class Work>
void for_batches(const std::vector<Operand<T>>& operands, const Work& work) {
  for (size_t first = 0; first < operands.size(); first += operands_a_launch) {
    const size_t count = std::min(operands.size() - first, operands_a_launch);
    Batch<T> batch{};
    int64_t largest = 0;
    for (size_t i = 0; i < count; ++i) {
      batch.each[i] = operands[first + i];
      largest = std::max(largest, batch.each[i].size);
    }
    work(batch, static_cast<unsigned>(count), first, largest);
  }
}

// Calls operation(operand, i) on the device for the elements i of [tasks][size] of every operand.
template <class T, class Operation>
void each_element(const Device& device, int64_t tasks, const std::vector<Operand<T>>& operands,
                  const Operation& operation) {
  for_batches(operands, [&](const Batch<T>& batch, unsigned count, size_t, int64_t largest) {
    const dim3 grid(grid_for(tasks * largest).x, count);
    device.launch(operands_kernel<T, Operation>, grid, threads_a_block, 0, batch, tasks, operation);
  });
}

template <class T>
__device__ T rate_of(const Operand<T>& o, int64_t i) {
  return o.per_element ? o.rate[i % o.size] : o.rate[0];
}

template <class T>
struct Load {
  __device__ void operator()(const Operand<T>& o, int64_t i) const { o.to[i] = o.from[o.is_shared ? i % o.size : i]; }
};

template <class T>
struct Clear {
  __device__ void operator()(const Operand<T>& o, int64_t i) const { o.to[i] = 0; }
};

template <class T>
struct Descend {
  T proximal;
  __device__ void operator()(const Operand<T>& o, int64_t i) const {
    T gradient = o.other[i];
    if (proximal != 0) gradient += proximal * (o.from[i] - o.initial[i]);
    o.to[i] = o.from[i] - rate_of(o, i) * gradient;
  }
};

template <class T>
struct ScaleByRate {
  __device__ void operator()(const Operand<T>& o, int64_t i) const { o.to[i] = -rate_of(o, i) * o.from[i]; }
};

template <class T>
struct AddScaled {
  T u;
  __device__ void operator()(const Operand<T>& o, int64_t i) const { o.to[i] += u * o.from[i]; }
};

template <class T>
struct Scale {
  T u;
  __device__ void operator()(const Operand<T>& o, int64_t i) const { o.to[i] = u * o.from[i]; }
};

template <class T>
struct AddTasks {  // over the elements of one task
  int64_t tasks;
  __device__ void operator()(const Operand<T>& o, int64_t i) const {
    T sum = o.to[i];
    for (int64_t task = 0; task < tasks; ++task) sum += o.from[task * o.size + i];
    o.to[i] = sum;
  }
};

// Of an α of its own for each element: over the elements of one task.
template <class T>
struct SubtractProducts {
  int64_t tasks;
  __device__ void operator()(const Operand<T>& o, int64_t i) const {
    if (!o.per_element) return;
    T sum = o.to[i];
    for (int64_t task = 0; task < tasks; ++task) sum -= o.from[task * o.size + i] * o.other[task * o.size + i];
    o.to[i] = sum;
  }
};

// Of one α for the parameter: a block for each task (x) of each operand (y) sums its products.
template <class T>
__global__ void sum_products_kernel(const Batch<T> batch, const int64_t tasks, double* sums) {
  __shared__ double memory[threads_a_block];
  const Operand<T> o = batch.each[blockIdx.y];
  const int64_t task = blockIdx.x;
  double total = 0;
  if (!o.per_element) {
    for (int64_t i = threadIdx.x; i < o.size; i += blockDim.x) {
      total += static_cast<double>(o.from[task * o.size + i] * o.other[task * o.size + i]);
    }
  }
  total = block_sum(total, memory);
  if (threadIdx.x == 0) sums[blockIdx.y * tasks + task] = total;
}

template <class T>
__global__ void subtract_sums_kernel(const Batch<T> batch, const int64_t tasks, const double* sums) {
  const Operand<T> o = batch.each[blockIdx.x];
  if (threadIdx.x > 0 || o.per_element) return;
  for (int64_t task = 0; task < tasks; ++task) o.to[0] -= static_cast<T>(sums[blockIdx.x * tasks + task]);
}

}  // namespace

template <class T>
void ParameterKernels<T>::load(int64_t tasks, const Operands& operands) const {
  each_element(device_, tasks, operands, Load<T>{});
}

template <class T>
void ParameterKernels<T>::clear(int64_t tasks, const Operands& operands) const {
  each_element(device_, tasks, operands, Clear<T>{});
}

template <class T>
void ParameterKernels<T>::descend(int64_t tasks, T proximal, const Operands& operands) const {
  each_element(device_, tasks, operands, Descend<T>{proximal});
}

template <class T>
void ParameterKernels<T>::scale_by_rate(int64_t tasks, const Operands& operands) const {
  each_element(device_, tasks, operands, ScaleByRate<T>{});
}

template <class T>
void ParameterKernels<T>::add(int64_t tasks, T u, const Operands& operands) const {
  each_element(device_, tasks, operands, AddScaled<T>{u});
}

template <class T>
void ParameterKernels<T>::scale(int64_t tasks, T u, const Operands& operands) const {
  each_element(device_, tasks, operands, Scale<T>{u});
}

template <class T>
void ParameterKernels<T>::add_tasks(int64_t tasks, const Operands& operands) const {
  each_element(device_, 1, operands, AddTasks<T>{tasks});
}

template <class T>
void ParameterKernels<T>::subtract_rate_gradient(int64_t tasks, const Operands& operands, double* scratch) const {
  each_element(device_, 1, operands, SubtractProducts<T>{tasks});
  for_batches(operands, [&](const Batch<T>& batch, unsigned count, size_t first, int64_t) {
    double* sums = scratch + static_cast<int64_t>(first) * tasks;
    device_.launch(sum_products_kernel<T>, dim3(static_cast<unsigned>(tasks), count), threads_a_block, 0, batch, tasks,
                   sums);
    device_.launch(subtract_sums_kernel<T>, count, 1, 0, batch, tasks, sums);
  });
}

template class ParameterKernels<float>;
template class ParameterKernels<double>;

}  // namespace innerloop::gpu
