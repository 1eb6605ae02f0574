// LayerNorm and GroupNorm: y = γ x̂ + β with x̂ = (x − m) r, r = 1/√(var + ε), m and var over a group of channels of one
// sample. A layer norm has one group, and γ, β of the sample's shape.
//
// With q = γ dy, and ⟨·⟩ the mean over a group:   B = ⟨q⟩, G = ⟨q x̂⟩,   dx = r (q − B − x̂ G)
// Along ẋ:   x̂′ = r (ẋ − ⟨ẋ⟩ − s x̂), s = ⟨x̂ ẋ⟩, ṙ = −r² s;   ẏ = γ̇ x̂ + γ x̂′ + β̇
//     q̇ = γ̇ dy + γ dẏ,   dẋ = −r² s (q − B − x̂ G) + r (q̇ − ⟨q̇⟩ − x̂′ G − x̂ ⟨q̇ x̂ + q x̂′⟩)
#include <algorithm>
#include <cmath>

#include "engine/layers.h"

namespace innerloop::INNERLOOP_ISA {
namespace {

template <class T>
class SampleNorm final : public Layer<T> {
 public:
  SampleNorm(const Node& node, const LayerContext<T>& context)
      : eps_(static_cast<T>(node.number)),
        x_(context.value(node.inputs[0])),
        y_(context.value(node.output)),
        groups_(node.kind == Kind::layer_norm ? 1 : node.groups),
        group_channels_(x_.shape.channels / groups_),
        parameter_pixel_(node.kind == Kind::layer_norm ? x_.stride : 0),
        weight_(context.offset(node.weight)),
        bias_(context.offset(node.bias)) {}

  int64_t state_size(int64_t samples) const override { return samples * groups_ * 4; }          // m, r, B, G
  int64_t tangent_state_size(int64_t samples) const override { return samples * groups_ * 2; }  // ⟨ẋ⟩, s

  void forward(const T* theta, const Primal<T>& p) override {
    for_groups(p.samples, [&](int64_t n, int64_t group, int64_t index) {
      T* state = p.state + 4 * index;
      state[0] = mean(n, group, [&](const Place& at) { return p.x[0][at.x]; });
      const T var = mean(n, group, [&](const Place& at) {
        const T difference = p.x[0][at.x] - state[0];
        return difference * difference;
      });
      state[1] = 1 / std::sqrt(var + eps_);
      for_each(n, group, [&](const Place& at) {
        p.y[at.y] = weight(theta, at) * normalised(p, at, state) + (bias_ < 0 ? T(0) : theta[bias_ + at.parameter]);
      });
    });
  }

  void backward(const T* theta, const Primal<T>& p, T* gradient) override {
    if (p.dx[0]) std::fill_n(p.dx[0], p.samples * x_.dense_size(), T(0));
    for_groups(p.samples, [&](int64_t n, int64_t group, int64_t index) {
      T* state = p.state + 4 * index;
      state[2] = mean(n, group, [&](const Place& at) { return weight(theta, at) * p.dy[at.dense]; });
      state[3] = mean(n, group,
                      [&](const Place& at) { return weight(theta, at) * p.dy[at.dense] * normalised(p, at, state); });
      for_each(n, group, [&](const Place& at) {
        const T x_hat = normalised(p, at, state);
        if (gradient && weight_ >= 0) gradient[weight_ + at.parameter] += p.dy[at.dense] * x_hat;
        if (gradient && bias_ >= 0) gradient[bias_ + at.parameter] += p.dy[at.dense];
        if (p.dx[0]) p.dx[0][at.dense] = state[1] * centred(theta, p, at, state);
      });
    });
  }

  void forward_tangent(const T* theta, const T* direction, const Primal<T>& p, const Tangent<T>& t) override {
    for_groups(p.samples, [&](int64_t n, int64_t group, int64_t index) {
      const T* state = p.state + 4 * index;
      T* along = t.state + 2 * index;
      along[0] = along[1] = 0;
      if (t.x[0]) {
        along[0] = mean(n, group, [&](const Place& at) { return t.x[0][at.x]; });
        along[1] = mean(n, group, [&](const Place& at) { return t.x[0][at.x] * normalised(p, at, state); });
      }
      for_each(n, group, [&](const Place& at) {
        T y = weight(theta, at) * normalised_tangent(p, t, at, state, along);
        if (direction && weight_ >= 0) y += direction[weight_ + at.parameter] * normalised(p, at, state);
        if (direction && bias_ >= 0) y += direction[bias_ + at.parameter];
        t.y[at.y] = y;
      });
    });
  }

  void backward_tangent(const T* theta, const T* direction, const Primal<T>& p, const Tangent<T>& t,
                        T* product) override {
    if (t.dx[0]) std::fill_n(t.dx[0], p.samples * x_.dense_size(), T(0));
    const auto q_tangent = [&](const Place& at) {
      const T moved = direction && weight_ >= 0 ? direction[weight_ + at.parameter] * p.dy[at.dense] : T(0);
      return moved + weight(theta, at) * t.dy[at.dense];
    };
    for_groups(p.samples, [&](int64_t n, int64_t group, int64_t index) {
      const T *state = p.state + 4 * index, *along = t.state + 2 * index;
      const T B_tangent = mean(n, group, q_tangent);
      const T G_tangent = mean(n, group, [&](const Place& at) {
        return q_tangent(at) * normalised(p, at, state) +
               weight(theta, at) * p.dy[at.dense] * normalised_tangent(p, t, at, state, along);
      });
      for_each(n, group, [&](const Place& at) {
        const T x_hat = normalised(p, at, state), x_hat_tangent = normalised_tangent(p, t, at, state, along);
        if (product && weight_ >= 0) {
          product[weight_ + at.parameter] += t.dy[at.dense] * x_hat + p.dy[at.dense] * x_hat_tangent;
        }
        if (product && bias_ >= 0) product[bias_ + at.parameter] += t.dy[at.dense];
        if (!t.dx[0]) return;
        const T changed = q_tangent(at) - B_tangent - x_hat_tangent * state[3] - x_hat * G_tangent;
        t.dx[0][at.dense] = state[1] * (changed - state[1] * along[1] * centred(theta, p, at, state));
      });
    });
  }

 private:
  struct Place {  // of one element
    int64_t x, y, dense, parameter;
  };

  template <class Visit>
  void for_groups(int64_t samples, const Visit& visit) const {
    for (int64_t n = 0; n < samples; ++n) {
      for (int64_t group = 0; group < groups_; ++group) visit(n, group, n * groups_ + group);
    }
  }

  template <class Visit>
  void for_each(int64_t n, int64_t group, const Visit& visit) const {
    const int64_t first = group * group_channels_;
    for (int64_t h = 0; h < x_.shape.height; ++h) {
      for (int64_t w = 0; w < x_.shape.width; ++w) {
        const int64_t pixel = h * x_.shape.width + w, in_row = w * x_.stride;
        for (int64_t c = first; c < first + group_channels_; ++c) {
          visit(Place{x_.row(n, h) + in_row + c, y_.row(n, h) + in_row + c, n * x_.dense_size() + pixel * x_.stride + c,
                      pixel * parameter_pixel_ + c});
        }
      }
    }
  }

  template <class Term>
  T mean(int64_t n, int64_t group, const Term& term) const {
    double total = 0;
    for_each(n, group, [&](const Place& at) { total += static_cast<double>(term(at)); });
    return static_cast<T>(total / static_cast<double>(group_channels_ * x_.pixels()));
  }

  T weight(const T* theta, const Place& at) const { return weight_ < 0 ? T(1) : theta[weight_ + at.parameter]; }

  static T normalised(const Primal<T>& p, const Place& at, const T* state) {
    return (p.x[0][at.x] - state[0]) * state[1];
  }
  static T normalised_tangent(const Primal<T>& p, const Tangent<T>& t, const Place& at, const T* state,
                              const T* along) {
    return t.x[0] ? state[1] * (t.x[0][at.x] - along[0] - along[1] * normalised(p, at, state)) : T(0);
  }
  // q − B − x̂ G
  T centred(const T* theta, const Primal<T>& p, const Place& at, const T* state) const {
    return weight(theta, at) * p.dy[at.dense] - state[2] - normalised(p, at, state) * state[3];
  }

  const T eps_;
  const ValueLayout x_, y_;
  const int64_t groups_, group_channels_;
  const int64_t parameter_pixel_;  // distance of a pixel's parameters to the next one's; 0: they share them
  const int64_t weight_, bias_;
};

}  // namespace

template <class T>
std::unique_ptr<Layer<T>> make_sample_norm(const Node& node, const LayerContext<T>& context) {
  return std::make_unique<SampleNorm<T>>(node, context);
}

template std::unique_ptr<Layer<float>> make_sample_norm(const Node&, const LayerContext<float>&);
template std::unique_ptr<Layer<double>> make_sample_norm(const Node&, const LayerContext<double>&);

}  // namespace innerloop::INNERLOOP_ISA
