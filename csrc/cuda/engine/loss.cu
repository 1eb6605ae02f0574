#include <cmath>

#include "cuda/block.h"
#include "cuda/engine/each.h"
#include "cuda/engine/loss.h"

namespace innerloop::gpu {
namespace {

constexpr int loss_threads = 128;

template <class T>
struct LossInput {
  LossKind kind;
  T smoothing;
  int64_t outputs;
  Targets<T> targets;
};

template <class T>
__device__ T largest_of(const T* y, int64_t outputs) {
  T largest = y[0];
  for (int64_t c = 1; c < outputs; ++c) largest = y[c] > largest ? y[c] : largest;
  return largest;
}

// −Σ q log p with q = (1 − ε)·one-hot + ε/C, as torch smooths; dy = scale (p − q).
template <class T>
__device__ double cross_entropy(const LossInput<T>& in, const T* y, int64_t label, T scale, T* dy) {
  const bool is_known = label >= 0 && label < in.outputs;
  const T top = largest_of(y, in.outputs);
  T sum = 0, mean = 0;
  for (int64_t c = 0; c < in.outputs; ++c) {
    sum += exp(y[c] - top);
    mean += y[c] - top;
  }
  mean /= static_cast<T>(in.outputs);
  if (dy != nullptr) {
    const T even = in.smoothing / static_cast<T>(in.outputs);
    for (int64_t c = 0; c < in.outputs; ++c) {
      const T q = (c == label ? 1 - in.smoothing : T(0)) + even;
      dy[c] = is_known ? scale * (exp(y[c] - top) / sum - q) : static_cast<T>(NAN);
    }
  }
  if (!is_known) return static_cast<double>(NAN);
  return static_cast<double>(log(sum) - (1 - in.smoothing) * (y[label] - top) - in.smoothing * mean);
}

template <class T>
__device__ double squared_error(const LossInput<T>& in, const T* y, const T* target, T scale, T* dy) {
  double total = 0;
  for (int64_t c = 0; c < in.outputs; ++c) {
    const T error = y[c] - target[c];
    total += static_cast<double>(error) * static_cast<double>(error);
    if (dy != nullptr) dy[c] = 2 * scale / static_cast<T>(in.outputs) * error;
  }
  return total / static_cast<double>(in.outputs);
}

// A block for each task, its threads by turns at the samples.
template <class T>
__global__ void loss_kernel(const LossInput<T> in, const T* y, const T weight, double* losses, double* sums, T* dy) {
  __shared__ double memory[loss_threads];
  const int64_t task = blockIdx.x, samples = in.targets.samples;
  const T valid = in.targets.valid[task];
  double total = 0;
  for (int64_t n = threadIdx.x; n < samples; n += blockDim.x) {
    const int64_t index = task * samples + n;
    T* gradient = dy == nullptr ? nullptr : dy + index * in.outputs;
    if (in.targets.mask != nullptr && !in.targets.mask[index]) {
      if (gradient != nullptr) {
        for (int64_t c = 0; c < in.outputs; ++c) gradient[c] = 0;
      }
      continue;
    }
    total += in.kind == LossKind::cross_entropy
                 ? cross_entropy(in, y + index * in.outputs, in.targets.labels[index], weight / valid, gradient)
                 : squared_error(in, y + index * in.outputs, in.targets.values + index * in.outputs, weight / valid,
                                 gradient);
  }
  const double mean = block_sum(total, memory) / static_cast<double>(valid);
  if (threadIdx.x != 0) return;
  if (losses != nullptr) losses[task] = mean;
  if (sums != nullptr) sums[task] += static_cast<double>(weight) * mean;
}

// A row of outputs each: p ∘ (ẏ − ⟨p, ẏ⟩)/n, or 2 ẏ/(n C). Smoothed labels are constants and play no part.
template <class T>
struct LossTangent {
  LossInput<T> in;
  const T* y;
  const T* y_tangent;
  T* dy_tangent;
  __device__ void operator()(int64_t index) const {
    const T* row = y + index * in.outputs;
    const T* along = y_tangent + index * in.outputs;
    T* to = dy_tangent + index * in.outputs;
    const bool is_valid = in.targets.mask == nullptr || in.targets.mask[index];
    const T scale = is_valid ? 1 / in.targets.valid[index / in.targets.samples] : T(0);
    if (!is_valid || in.kind == LossKind::mse) {
      for (int64_t c = 0; c < in.outputs; ++c) to[c] = 2 * scale / static_cast<T>(in.outputs) * along[c];
      return;
    }
    const T top = largest_of(row, in.outputs);
    T sum = 0, mean = 0;
    for (int64_t c = 0; c < in.outputs; ++c) {
      const T e = exp(row[c] - top);
      sum += e;
      mean += e * along[c];
    }
    mean /= sum;
    for (int64_t c = 0; c < in.outputs; ++c) to[c] = scale / sum * exp(row[c] - top) * (along[c] - mean);
  }
};

}  // namespace

template <class T>
void TaskLoss<T>::value(int64_t tasks, const T* y, const Targets<T>& targets, T weight, double* losses, double* sums,
                        T* dy) const {
  const LossInput<T> in{kind_, smoothing_, outputs_, targets};
  device_.launch(loss_kernel<T>, static_cast<unsigned>(tasks), loss_threads, 0, in, y, weight, losses, sums, dy);
}

template <class T>
void TaskLoss<T>::tangent(int64_t tasks, const T* y, const T* y_tangent, const Targets<T>& targets,
                          T* dy_tangent) const {
  const LossInput<T> in{kind_, smoothing_, outputs_, targets};
  each(device_, tasks * targets.samples, LossTangent<T>{in, y, y_tangent, dy_tangent});
}

template class TaskLoss<float>;
template class TaskLoss<double>;

}  // namespace innerloop::gpu
