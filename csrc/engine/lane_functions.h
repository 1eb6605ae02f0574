// What the lanes executor does element by element: smooth activations and losses.
#pragma once

#include <cmath>
#include <cstdint>

#include "engine/activation_functions.h"
#include "engine/lane_kernels.h"
#include "engine/request.h"

namespace innerloop::INNERLOOP_ISA {

// y = f(y), slope = f′ and, where wanted, curvature = f″ there.
template <class T>
void apply_smooth(const Node& activation, int64_t size, T* y, T* slope, T* curvature) {
  const auto apply = [=](const auto& f) {
    for (int64_t i = 0; i < size; ++i) {
      const T z = y[i];
      y[i] = f.value(z);
      slope[i] = f.slope(z);
      if (curvature) curvature[i] = f.curvature(z);
    }
  };
  with_activation<T>(activation, apply);
}

// The loss of outputs y [outputs][N][L] against targets of the same shape: values, or for cross-entropy distributions
// q. Samples count with weights [N][L].
template <class T, int L>
struct LaneLoss {
  using Lane = Lanes<T, L>;

  LossKind kind;
  int64_t outputs, samples;

  // Σₙ weightₙ lossₙ, if wanted; dy = scale times its gradient (null: not wanted). Cross-entropy leaves softmax(y) in
  // p.
  Lane value(const T* y, const T* targets, const T* weights, T scale, bool value_wanted, T* p, T* dy) const {
    Lane total{};
    for (int64_t n = 0; n < samples; ++n) {
      const Lane weight = load_lanes<T, L>(weights + n * L);
      total += weight * (kind == LossKind::mse ? squared_error(n, y, targets, scale * weight, dy)
                                               : cross_entropy(n, y, targets, scale * weight, value_wanted, p, dy));
    }
    return total;
  }

  // dẏ from ẏ: the loss's Hessian times it.
  void tangent(const T* p, const T* weights, const T* y_tangent, T* dy_tangent) const {
    for (int64_t n = 0; n < samples; ++n) {
      const Lane weight = load_lanes<T, L>(weights + n * L);
      Lane mean{};  // ⟨p, ẏ⟩
      if (kind == LossKind::cross_entropy) {
        for (int64_t o = 0; o < outputs; ++o) mean += get(p, o, n) * get(y_tangent, o, n);
      }
      for (int64_t o = 0; o < outputs; ++o) {
        put(dy_tangent, o, n,
            kind == LossKind::mse ? 2 / static_cast<T>(outputs) * weight * get(y_tangent, o, n)
                                  : weight * get(p, o, n) * (get(y_tangent, o, n) - mean));
      }
    }
  }

 private:
  Lane get(const T* array, int64_t o, int64_t n) const { return load_lanes<T, L>(array + (o * samples + n) * L); }
  void put(T* array, int64_t o, int64_t n, Lane v) const { store_lanes<T, L>(array + (o * samples + n) * L, v); }

  Lane squared_error(int64_t n, const T* y, const T* targets, Lane scale, T* dy) const {
    Lane total{};
    for (int64_t o = 0; o < outputs; ++o) {
      const Lane error = get(y, o, n) - get(targets, o, n);
      total += error * error;
      if (dy) put(dy, o, n, 2 / static_cast<T>(outputs) * scale * error);
    }
    return total / static_cast<T>(outputs);
  }

  // −Σ q log p
  Lane cross_entropy(int64_t n, const T* y, const T* q, Lane scale, bool value_wanted, T* p, T* dy) const {
    Lane top = get(y, 0, n);
    for (int64_t o = 1; o < outputs; ++o) {
      const Lane value = get(y, o, n);
      top = value > top ? value : top;
    }
    Lane sum{}, expected{};
    for (int64_t o = 0; o < outputs; ++o) {
      const Lane below = get(y, o, n) - top, e = exponential(below);
      put(p, o, n, e);
      sum += e;
      expected += get(q, o, n) * below;
    }
    for (int64_t o = 0; o < outputs; ++o) {
      const Lane probability = get(p, o, n) / sum;
      put(p, o, n, probability);
      if (dy) put(dy, o, n, scale * (probability - get(q, o, n)));
    }
    if (!value_wanted) return Lane{};
    return logarithm(sum) - expected;
  }

  static Lane exponential(Lane x) {
    for (int i = 0; i < L; ++i) x[i] = std::exp(x[i]);
    return x;
  }

  static Lane logarithm(Lane x) {
    for (int i = 0; i < L; ++i) x[i] = std::log(x[i]);
    return x;
  }
};

}  // namespace innerloop::INNERLOOP_ISA
