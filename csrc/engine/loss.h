// The losses of the blocks executor: mean over one task's samples of outputs y [N][stride], and their derivatives.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "engine/request.h"

namespace innerloop::INNERLOOP_ISA {

// The targets of one task's N samples: labels [N], or targets [N, outputs].
template <class T>
struct Targets {
  const int64_t* labels = nullptr;
  const T* values = nullptr;
};

template <class T>
class TaskLoss {
 public:
  TaskLoss(LossKind kind, T label_smoothing, int64_t outputs, int64_t stride)
      : kind_(kind), smoothing_(label_smoothing), outputs_(outputs), stride_(stride) {}

  // The mean loss; dy = weight times its gradient (null: not wanted).
  double value(const T* y, const Targets<T>& targets, int64_t samples, T weight, T* dy) const {
    double total = 0;
    for (int64_t n = 0; n < samples; ++n, y += stride_) {
      total += kind_ == LossKind::cross_entropy
                   ? cross_entropy(y, targets.labels[n], weight / static_cast<T>(samples), dy)
                   : squared_error(y, targets.values + n * outputs_, weight / static_cast<T>(samples), dy);
      if (dy != nullptr) dy += stride_;
    }
    return total / static_cast<double>(samples);
  }

  // The change dẏ of the gradient as y moves along ẏ: the loss's Hessian times ẏ.
  void tangent(const T* y, const T* y_tangent, int64_t samples, T* dy_tangent) const {
    const T scale = 1 / static_cast<T>(samples);
    for (int64_t n = 0; n < samples; ++n, y += stride_, y_tangent += stride_, dy_tangent += stride_) {
      if (kind_ == LossKind::mse) {
        for (int64_t c = 0; c < outputs_; ++c) dy_tangent[c] = 2 * scale / static_cast<T>(outputs_) * y_tangent[c];
        continue;
      }
      // p ∘ (ẏ − ⟨p, ẏ⟩); smoothed labels are constants and play no part
      const T sum = exponentials(y, dy_tangent);
      T mean = 0;
      for (int64_t c = 0; c < outputs_; ++c) mean += dy_tangent[c] * y_tangent[c];
      mean /= sum;
      for (int64_t c = 0; c < outputs_; ++c) dy_tangent[c] *= scale / sum * (y_tangent[c] - mean);
    }
  }

 private:
  T largest(const T* y) const { return *std::max_element(y, y + outputs_); }

  // exp(y − max y), and their sum.
  T exponentials(const T* y, T* into) const {
    const T top = largest(y);
    T sum = 0;
    for (int64_t c = 0; c < outputs_; ++c) sum += into[c] = std::exp(y[c] - top);
    return sum;
  }

  // −Σ q log p with q = (1 − ε)·one-hot + ε/C, as torch smooths.
  double cross_entropy(const T* y, int64_t label, T scale, T* dy) const {
    const T top = largest(y);
    T sum = 0, mean = 0;
    for (int64_t c = 0; c < outputs_; ++c) {
      const T e = std::exp(y[c] - top);
      sum += e;
      mean += y[c] - top;
      if (dy != nullptr) dy[c] = e;
    }
    mean /= static_cast<T>(outputs_);
    if (dy != nullptr) {
      const T even = smoothing_ / static_cast<T>(outputs_);
      for (int64_t c = 0; c < outputs_; ++c) dy[c] = scale * (dy[c] / sum - even);
      dy[label] -= scale * (1 - smoothing_);
    }
    const T log_sum = std::log(sum);
    return static_cast<double>(log_sum - (1 - smoothing_) * (y[label] - top) - smoothing_ * mean);
  }

  double squared_error(const T* y, const T* target, T scale, T* dy) const {
    double total = 0;
    for (int64_t c = 0; c < outputs_; ++c) {
      const T error = y[c] - target[c];
      total += static_cast<double>(error) * static_cast<double>(error);
      if (dy != nullptr) dy[c] = 2 * scale / static_cast<T>(outputs_) * error;
    }
    return total / static_cast<double>(outputs_);
  }

  LossKind kind_;
  T smoothing_;
  int64_t outputs_, stride_;
};

}  // namespace innerloop::INNERLOOP_ISA
