// What passes through the layers of a chain are made of on the lanes executor: forward, backward and the tangent of
// each. A gradient of parameters is computed where it is used: for_gradient() hands over δ·xᵀ element by element.
#pragma once

#include <algorithm>
#include <vector>

#include "engine/arena.h"
#include "engine/lane_functions.h"
#include "engine/lane_kernels.h"
#include "engine/lane_tasks.h"
#include "engine/lanes_shared.h"

namespace innerloop::INNERLOOP_ISA {

// A parameter: numbers shared by all tasks, or lanes.
template <class T>
struct LaneView {
  const T* data;
  bool shared;
};

// θ_k.
template <class T>
struct LaneTheta {
  const LanesShared<T>& shared;
  const T* own;    // θ₀ of the parameters of which each task has its own: [elements of all parameters][L]
  const T* moved;  // what the steps have made of the adapted ones; null at k = 0

  LaneView<T> at(int parameter) const {
    const int64_t offset = shared.offset(parameter) * lane_count<T>;
    if (moved && shared.request.is_adapted(parameter)) return {moved + offset, false};
    const ParameterArgument<T>& argument = shared.request.parameters[static_cast<size_t>(parameter)];
    return argument.per_task ? LaneView<T>{own + offset, false} : LaneView<T>{argument.data, true};
  }
};

// Along which parameters move in a Hessian-vector product: scale times these.
template <class T>
struct LaneDirection {
  const T* data;
  T scale;
};

// One set of N samples through the layers. By layer: arrays [outputs][N][L].
template <class T>
struct LanePass {
  int64_t samples = 0;  // N
  bool spread = false;  // over lanes: LaneTasks says what it means
  const T* x = nullptr;
  std::vector<T*> y, dz;             // outputs, and the gradients at z
  std::vector<T*> slope, curvature;  // of smooth layers: f′(z), and f″(z) ⊙ dy; in a tangent the slope holds ż
  T* probabilities = nullptr;        // softmax(y) of the top layer, for cross-entropy

  explicit LanePass(size_t layers = 0) : y(layers), dz(layers), slope(layers), curvature(layers) {}

  const T* input(size_t l) const { return l == 0 ? x : y[l - 1]; }
};

// δ and x of δ·xᵀ.
template <class T>
struct GradientSource {
  const T* dz = nullptr;
  const T* x = nullptr;
};

template <class T>
class LaneChain {
  static constexpr int L = lane_count<T>;
  using Lane = Lanes<T, L>;
  using Pass = LanePass<T>;
  using Theta = LaneTheta<T>;
  using Direction = LaneDirection<T>;

 public:
  LaneChain(const LanesShared<T>& shared, Arena& arena)
      : shared_(shared), request_(shared.request), chain_(shared.chain), fixed_layers_(shared.fixed_layers) {
    int64_t widest = 0;
    for (const ChainLayer& layer : chain_) widest = std::max(widest, layer.outputs);
    zeros_ = arena.take<T>(widest * L);
    bias_ = arena.take<T>(widest * L);
    std::fill_n(zeros_, widest * L, T(0));
  }

  int64_t outputs_size(size_t l, const Pass& pass) const { return chain_[l].outputs * pass.samples * L; }

  // --- primal ------------------------------------------------------------------------------------

  void forward(Pass& pass, const Theta& theta, size_t begin, size_t end) const {
    const int64_t N = pass.samples;
    for (size_t l = begin; l < end; ++l) {
      const LaneView<T> weight = theta.at(chain_[l].weight);
      products(
          weight.shared, N, chain_[l].outputs, {}, through(l, N, pass.input(l), weight),
          [bias = bias_at(l, theta)](int64_t o) { return load_lanes<T, L>(bias + o * L); },
          [y = pass.y[l], N, below = negative_slope(l)](int64_t n, int64_t o, Lane z) {
            store_lanes<T, L>(y + (o * N + n) * L, z > 0 ? z : below * z);
          });
      if (chain_[l].is_smooth()) {
        apply_smooth(*chain_[l].activation, outputs_size(l, pass), pass.y[l], pass.slope[l], pass.curvature[l]);
      }
    }
  }

  // The mean loss over each task's valid samples, and into dz of the top layer its gradient times scale.
  Lane loss(Pass& pass, const LaneSamples<T>& samples, T scale, bool value_wanted, bool gradient_wanted) const {
    Lane value = loss_of(pass).value(pass.y.back(), samples.targets, samples.weights, scale, value_wanted,
                                     pass.probabilities, gradient_wanted ? pass.dz.back() : nullptr);
    if (gradient_wanted) through_top(pass, pass.dz.back());
    if (gradient_wanted) to_z(pass, chain_.size() - 1);
    return pass.spread ? sum_everywhere<T, L>(value) : value;
  }

  // Gradients at z of layers top … bottom from dz of the top one.
  void backward(Pass& pass, const Theta& theta, size_t top, size_t bottom) const {
    for (size_t l = top; l > bottom; --l) {
      input_gradient(pass, theta, l, {}, pass.dz[l], pass.dz[l - 1]);
      to_z(pass, l - 1);
    }
  }

  // to = the gradient at the input of layer l, dz·W and what moving adds to it, times f′ of the layer below where that
  // is piecewise linear.
  void input_gradient(const Pass& pass, const Theta& theta, size_t l, const LaneProduct<T>& moving, const T* dz,
                      T* to) const {
    const int64_t N = pass.samples;
    const LaneView<T> weight = theta.at(chain_[l].weight);
    products(
        weight.shared, N, chain_[l].inputs, moving, back_through(l, N, dz, weight), [](int64_t) { return Lane{}; },
        [to, y = pass.y[l - 1], N, below = negative_slope(l - 1)](int64_t n, int64_t i, Lane g) {
          const int64_t at = (i * N + n) * L;
          store_lanes<T, L>(to + at, load_lanes<T, L>(y + at) > 0 ? g : below * g);
        });
  }

  // Calls update(element, gradient) for every element of a parameter of layer l: of the weight Σₙ δ₁x₁ᵀ + δ₂x₂ᵀ, of the
  // bias Σₙ δ₁, n over the samples of this pass.
  template <class Update>
  void for_gradient(int p, const Pass& pass, const GradientSource<T>& one, const GradientSource<T>& two,
                    const Update update) const {
    const ChainLayer& layer = chain_[shared_.layer_of(p)];
    const int64_t N = pass.samples;
    const auto of_task = [spread = pass.spread](Lane sum) { return spread ? sum_everywhere<T, L>(sum) : sum; };
    if (p == layer.weight) {
      const int64_t inputs = layer.inputs;
      lane_products<T, L, false>(
          layer.outputs, inputs, outer(N, one), outer(N, two), [](int64_t) { return Lane{}; },
          [=](int64_t o, int64_t i, Lane g) { update(o * inputs + i, of_task(g)); });
      return;
    }
    for (int64_t o = 0; o < layer.outputs; ++o) {
      Lane sum{};
      for (int64_t n = 0; n < N; ++n) sum += load_lanes<T, L>(one.dz + (o * N + n) * L);
      update(o, of_task(sum));
    }
  }

  template <class Update>
  void for_gradient(int p, const Pass& pass, const Update update) const {
    const size_t l = shared_.layer_of(p);
    for_gradient(p, pass, {pass.dz[l], pass.input(l)}, {}, update);
  }

  // v += scale · the gradients of what is tracked in layers begin … end − 1.
  void add_gradients(const Pass& pass, size_t begin, size_t end, T scale, T* v) const {
    for_tracked(begin, end, [&](int p) { for_gradient(p, pass, AddScaled{v + shared_.offset(p) * L, scale}); });
  }

  // --- the tangents ------------------------------------------------------------------------------

  // ẏ of the moving layers: ż = x·Ẇᵀ + ẋ·Wᵀ + ḃ, ẏ = f′(z) ⊙ ż.
  void forward_tangent(const Pass& pass, const Theta& theta, const Direction& direction, Pass& tangent) const {
    const int64_t N = pass.samples;
    for (size_t l = fixed_layers_; l < chain_.size(); ++l) {
      const ChainLayer& layer = chain_[l];
      LaneProduct<T> one, two;
      if (request_.is_adapted(layer.weight)) {
        one = through(l, N, pass.input(l), {direction.data + shared_.offset(layer.weight) * L, false});
      }
      const LaneView<T> weight = theta.at(layer.weight);
      if (l > fixed_layers_) two = through(l, N, tangent.y[l - 1], weight);
      const bool bias_moves = layer.bias >= 0 && request_.is_adapted(layer.bias);
      products(
          weight.shared, N, layer.outputs, one, two,
          [bias = bias_moves ? direction.data + shared_.offset(layer.bias) * L : zeros_](int64_t o) {
            return load_lanes<T, L>(bias + o * L);
          },
          [to = tangent.y[l], y = pass.y[l], N, below = negative_slope(l)](int64_t n, int64_t o, Lane z) {
            const int64_t at = (o * N + n) * L;
            store_lanes<T, L>(to + at, load_lanes<T, L>(y + at) > 0 ? z : below * z);
          });
      if (!layer.is_smooth()) continue;
      std::copy_n(tangent.y[l], outputs_size(l, pass), tangent.slope[l]);
      for (int64_t i = 0, size = outputs_size(l, pass); i < size; ++i) tangent.y[l][i] *= pass.slope[l][i];
    }
  }

  void loss_tangent(const Pass& pass, const LaneSamples<T>& samples, Pass& tangent) const {
    loss_of(pass).tangent(pass.probabilities, samples.weights, tangent.y.back(), tangent.dz.back());
    through_top(pass, tangent.dz.back());
    tangent_to_z(pass, chain_.size() - 1, tangent);
  }

  // dz·Ẇ of layer l, if its weight moves.
  LaneProduct<T> back_along(const Pass& pass, const Direction& direction, size_t l) const {
    const int weight = chain_[l].weight;
    if (!request_.is_adapted(weight)) return {};
    return back_through(l, pass.samples, pass.dz[l], {direction.data + shared_.offset(weight) * L, false});
  }

  // dż of layer l − 1 from that of l: dẋ = dz·Ẇ + dż·W.
  void backward_tangent(const Pass& pass, const Theta& theta, const LaneProduct<T>& moving, size_t l,
                        Pass& tangent) const {
    input_gradient(pass, theta, l, moving, tangent.dz[l], tangent.dz[l - 1]);
    tangent_to_z(pass, l - 1, tangent);
  }

  // v += scale · the tangents of layer l's gradients, dżᵀ·x + dzᵀ·ẋ.
  void add_gradient_tangents(const Pass& pass, const Pass& tangent, size_t l, T scale, T* v) const {
    const GradientSource<T> one{tangent.dz[l], pass.input(l)};
    const GradientSource<T> two{pass.dz[l], l > fixed_layers_ ? tangent.y[l - 1] : nullptr};
    for_tracked(l, l + 1, [&](int p) { for_gradient(p, pass, one, two, AddScaled{v + shared_.offset(p) * L, scale}); });
  }

 private:
  struct AddScaled {
    T* to;
    T scale;
    void operator()(int64_t e, Lane g) const {
      store_lanes<T, L>(to + e * L, load_lanes<T, L>(to + e * L) + scale * g);
    }
  };

  template <class Visit>
  void for_tracked(size_t begin, size_t end, const Visit& visit) const {
    for (size_t l = begin; l < end; ++l) {
      for (const int p : {chain_[l].weight, chain_[l].bias}) {
        if (shared_.is_tracked(p)) visit(p);
      }
    }
  }

  // --- products ----------------------------------------------------------------------------------

  // x·Wᵀ: p is the sample, q the output.
  LaneProduct<T> through(size_t l, int64_t N, const T* x, const LaneView<T>& weight) const {
    const int64_t w = weight.shared ? 1 : L, inputs = chain_[l].inputs;
    return {x, L, N * L, weight.data, inputs * w, w, inputs};
  }

  // dz·W: p is the sample, q the input.
  LaneProduct<T> back_through(size_t l, int64_t N, const T* dz, const LaneView<T>& weight) const {
    const int64_t w = weight.shared ? 1 : L;
    return {dz, L, N * L, weight.data, w, chain_[l].inputs * w, chain_[l].outputs};
  }

  // dzᵀ·x: p is the output, q the input.
  LaneProduct<T> outer(int64_t N, const GradientSource<T>& source) const {
    if (!source.dz || !source.x) return {};
    return {source.dz, N * L, L, source.x, N * L, L, N};
  }

  template <class First, class Last>
  void products(bool shared, int64_t P, int64_t Q, const LaneProduct<T>& one, const LaneProduct<T>& two, First first,
                Last last) const {
    shared ? lane_products<T, L, true>(P, Q, one, two, first, last)
           : lane_products<T, L, false>(P, Q, one, two, first, last);
  }

  // The bias of a layer as lanes; of a layer without one, zeros.
  const T* bias_at(size_t l, const Theta& theta) const {
    if (chain_[l].bias < 0) return zeros_;
    const LaneView<T> bias = theta.at(chain_[l].bias);
    if (!bias.shared) return bias.data;
    for (int64_t o = 0; o < chain_[l].outputs; ++o) store_lanes<T, L>(bias_ + o * L, spread<T, L>(bias.data[o]));
    return bias_;
  }

  // --- activations and loss -----------------------------------------------------------------------

  T negative_slope(size_t l) const { return static_cast<T>(chain_[l].negative_slope()); }

  LaneLoss<T, L> loss_of(const Pass& pass) const { return {request_.loss, chain_.back().outputs, pass.samples}; }

  // f′ of a piecewise linear activation after the last layer.
  void through_top(const Pass& pass, T* dz) const {
    const T below = negative_slope(chain_.size() - 1);
    if (below == 1) return;
    const T* y = pass.y.back();
    for (int64_t i = 0, size = outputs_size(chain_.size() - 1, pass); i < size; ++i) {
      if (!(y[i] > 0)) dz[i] *= below;
    }
  }

  // dz of a smooth layer holds dy: from there to z.
  void to_z(Pass& pass, size_t l) const {
    if (!chain_[l].is_smooth()) return;
    const T* slope = pass.slope[l];
    T *dz = pass.dz[l], *curvature = pass.curvature[l];
    for (int64_t i = 0, size = outputs_size(l, pass); i < size; ++i) {
      if (curvature) curvature[i] *= dz[i];
      dz[i] *= slope[i];
    }
  }

  // dż = f′(z) ⊙ dẏ + f″(z) ⊙ dy ⊙ ż
  void tangent_to_z(const Pass& pass, size_t l, Pass& tangent) const {
    if (!chain_[l].is_smooth()) return;
    T* dz = tangent.dz[l];
    const T *slope = pass.slope[l], *curvature = pass.curvature[l], *z = tangent.slope[l];
    for (int64_t i = 0, size = outputs_size(l, pass); i < size; ++i) dz[i] = slope[i] * dz[i] + curvature[i] * z[i];
  }

  const LanesShared<T>& shared_;
  const Request<T>& request_;
  const std::vector<ChainLayer>& chain_;
  const size_t fixed_layers_;
  T *zeros_, *bias_;
};

}  // namespace innerloop::INNERLOOP_ISA
