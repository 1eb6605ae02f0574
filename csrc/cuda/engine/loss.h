// The losses of every task of a chunk: a mean over its valid samples, with its first and second derivatives.
#pragma once

#include "cuda/engine/host.h"
#include "cuda/launch.h"

namespace innerloop::gpu {

// The samples of one side of a chunk, and what their outputs should be.
template <class T>
struct Targets {
  const int64_t* labels = nullptr;  // [tasks, samples]
  const T* values = nullptr;        // [tasks, samples, outputs]
  const bool* mask = nullptr;       // [tasks, samples]; null: all are valid
  const T* valid = nullptr;         // [tasks]: how many are
  int64_t samples = 0;
};

template <class T>
class TaskLoss {
 public:
  TaskLoss(const Device& device, const Request<T>& request)
      : device_(device),
        kind_(request.loss),
        smoothing_(request.label_smoothing),
        outputs_(request.program->values[static_cast<size_t>(request.program->output)].channels) {}

  // losses [tasks] = the mean losses of outputs y, sums [tasks] += weight times them, and dy = weight times their
  // gradients; null: not wanted. A label that no output stands for makes all three NaN: the host, which could refuse
  // it, does not wait for the device.
  void value(int64_t tasks, const T* y, const Targets<T>& targets, T weight, double* losses, double* sums, T* dy) const;

  // The change dẏ of the gradient (of weight 1) as y moves along ẏ: the loss's Hessian times ẏ.
  void tangent(int64_t tasks, const T* y, const T* y_tangent, const Targets<T>& targets, T* dy_tangent) const;

 private:
  const Device& device_;
  const LossKind kind_;
  const T smoothing_;
  const int64_t outputs_;
};

}  // namespace innerloop::gpu
