// One thread's executor of the recurrence over a vector of tasks: see recurrence.h for what its operations mean.
//
// Of the chain's layers, those below the lowest adapted one are fixed: they are passed once per set of samples, and
// what the gradients leave at their upper end goes down through them once, at the end. The others move with the inner
// steps. A gradient of parameters is computed where it is used: descend() multiplies δ·xᵀ and subtracts it in one go,
// so gₖ is never stored.
#pragma once

#include <algorithm>
#include <array>
#include <utility>
#include <vector>

#include "engine/arena.h"
#include "engine/lane_functions.h"
#include "engine/lane_kernels.h"
#include "engine/lanes_shared.h"
#include "engine/recurrence.h"

namespace innerloop::INNERLOOP_ISA {

template <class T>
class LaneExecutor {
  static constexpr int L = lane_count<T>;
  using Lane = Lanes<T, L>;

 public:
  LaneExecutor(LanesShared<T>& shared, Arena& arena)
      : shared_(shared),
        request_(shared.request),
        chain_(shared.chain),
        layers_(shared.chain.size()),
        fixed_layers_(shared.fixed_layers),
        backward_(request_.wants_gradients()),
        second_order_(backward_ && !request_.first_order) {
    allocate(arena);
  }

  // Tasks first … first + count − 1, count ≤ L.
  void run(int64_t first, int64_t count) {
    start(first, count);
    run_recurrence(*this, request_);
    write_own_results();
  }

  // Adds what the last run found to the sums over tasks, lane by lane.
  void add_shared() const {
    if (!backward_) return;
    for (const int p : shared_.results) {
      if (argument(p).per_task) continue;
      add_lanes(v_ + offset(p) * L, shared_.size(p), shared_.total.data() + offset(p) * L);
    }
    for (const int p : shared_.learned_rates) {
      add_lanes(at(rate_gradients_, p), shared_.rate_size(p), at(shared_.rate_totals, p).data());
    }
  }

  // --- the operations of the recurrence ---------------------------------------------------------

  void support_pass(int64_t k) {
    Pass& pass = support_pass_of(k);
    forward(pass, k, fixed_layers_, layers_);
    const bool value_wanted = k == 0 && request_.support_weight != 0;
    const Lane loss = loss_of(pass, support_, T(1), value_wanted, true);
    if (value_wanted) support_loss_ = loss;
    backward(pass, k, layers_ - 1, fixed_layers_);
  }

  void descend(int64_t k) {
    T* next = theta_storage(k + 1);
    for (const int p : shared_.adapted) {
      const Rate rate = rate_at(p, k);
      const View current = parameter_at(p, k);
      T* to = next + offset(p) * L;
      const auto update = [&]<bool shared>() {
        for_gradient(p, support_.count, primal_source(support_pass_of(k), shared_.layer_of(p)), {},
                     [=, from = current.data](int64_t e, Lane g) {
                       const Lane old = read<T, L, shared>(from + e * (shared ? 1 : L));
                       store_lanes<T, L>(to + e * L, old - rate.data[e * rate.stride] * g);
                     });
      };
      current.shared ? update.template operator()<true>() : update.template operator()<false>();
    }
  }

  void add_support_loss(T u) { task_loss_ += u * support_loss_; }

  void query_pass(int64_t k, T weight, bool backward_too) {
    if (query_.count == 0) return;
    forward(query_pass_, k, fixed_layers_, layers_);
    const Lane loss = loss_of(query_pass_, query_, weight, true, backward_too);
    if (weight != 0) task_loss_ += weight * loss;
    if (k == request_.steps) write_logits();
    if (!backward_too) return;
    backward(query_pass_, k, layers_ - 1, fixed_layers_);
    add_gradients(query_pass_, fixed_layers_, layers_, T(1));
    cross_boundary(query_pass_, k, {}, T(1), fixed_query_);
  }

  void add_rate_gradient(int64_t k) {
    for (const int p : shared_.learned_rates) {
      for_gradient(p, support_.count, primal_source(support_pass_of(k), shared_.layer_of(p)), {},
                   [to = scratch_](int64_t e, Lane g) { store_lanes<T, L>(to + e * L, g); });
      const RateArgument<T>& rate = at(request_.rates, p);
      const int64_t size = shared_.size(p);
      T* to = at(rate_gradients_, p) + (rate.per_step ? k : 0) * (rate.per_element ? size : 1) * L;
      const T* v = v_ + offset(p) * L;
      for (int64_t e = 0; e < size; ++e) {
        const Lane product = load_lanes<T, L>(v + e * L) * load_lanes<T, L>(scratch_ + e * L);
        T* place = to + (rate.per_element ? e * L : 0);
        store_lanes<T, L>(place, load_lanes<T, L>(place) - product);
      }
    }
  }

  void subtract_hessian_product(int64_t k) {
    if (fixed_layers_ == layers_) return;
    const Direction direction = direction_at(k);
    const Pass& pass = support_pass_of(k);
    forward_tangent(pass, k, direction);
    loss_tangent(pass);
    for (size_t l = layers_ - 1;; --l) {
      // Before v changes, which may be the direction itself.
      const LaneProduct<T> moving = back_along(pass, direction, l);
      if (l > fixed_layers_) {
        backward_tangent(pass, k, moving, l);
      } else {
        cross_boundary(tangent_, k, moving, -direction.scale, fixed_support_);
      }
      for (const int p : parameters_of(l)) {
        if (!is_tracked(p)) continue;
        const GradientSource one{tangent_.dz[l], input_of(pass, l)};
        const GradientSource two{pass.dz[l], l > fixed_layers_ ? tangent_.y[l - 1] : nullptr};
        for_gradient(p, support_.count, one, two, AddScaled{v_ + offset(p) * L, -direction.scale});
      }
      if (l == fixed_layers_) break;
    }
  }

  void add_support_gradient(T u) {
    const Pass& pass = support_pass_of(0);
    add_gradients(pass, fixed_layers_, layers_, u);
    cross_boundary(pass, 0, {}, u, fixed_support_);
  }

  // What has arrived at the boundary goes down through the fixed layers.
  void finish() {
    if (!crosses_boundary()) return;
    for (Pass* pass : {&fixed_support_, &fixed_query_}) {
      if (pass->samples == 0) continue;
      backward(*pass, 0, fixed_layers_ - 1, shared_.lowest_tracked);
      add_gradients(*pass, shared_.lowest_tracked, fixed_layers_, T(1));
    }
  }

 private:
  // A parameter: numbers shared by all tasks, or lanes.
  struct View {
    const T* data;
    bool shared;
  };

  // α at one step: of an element, or with stride 0 of all of them.
  struct Rate {
    const T* data;
    int64_t stride;
  };

  // Along which parameters move in a Hessian-vector product: scale times these.
  struct Direction {
    const T* data;
    T scale;
  };

  // One set of N samples through the layers. By layer: arrays [outputs][N][L].
  struct Pass {
    int64_t samples = 0;
    const T* x = nullptr;
    std::vector<T*> y, dz;             // outputs, and the gradients at z
    std::vector<T*> slope, curvature;  // of smooth layers: f′(z), and f″(z) ⊙ dy
    T* probabilities = nullptr;        // softmax(y) of the top layer, for cross-entropy

    explicit Pass(size_t layers = 0) : y(layers), dz(layers), slope(layers), curvature(layers) {}
  };

  // One side's samples as the loss reads them.
  struct Loaded {
    int64_t count = 0;
    T* x = nullptr;
    T* targets = nullptr;  // [outputs][N][L]; for labels the distribution that cross-entropy compares with
    T* weights = nullptr;  // [N][L]: 1 / valid samples of the task, 0 for the others
  };

  // δ and x of δ·xᵀ.
  struct GradientSource {
    const T* dz = nullptr;
    const T* x = nullptr;
  };

  struct AddScaled {
    T* to;
    T scale;
    void operator()(int64_t e, Lane g) const {
      store_lanes<T, L>(to + e * L, load_lanes<T, L>(to + e * L) + scale * g);
    }
  };

  template <class Items>
  static decltype(auto) at(Items& items, int index) {
    return items[static_cast<size_t>(index)];
  }

  // --- memory ----------------------------------------------------------------------------------

  int64_t offset(int parameter) const { return at(shared_.offsets, parameter); }
  const ParameterArgument<T>& argument(int parameter) const { return at(request_.parameters, parameter); }
  bool is_tracked(int parameter) const { return parameter >= 0 && at(shared_.tracked, parameter); }
  bool crosses_boundary() const { return shared_.lowest_tracked < fixed_layers_; }
  Pass& support_pass_of(int64_t k) { return supports_[keeps_passes() ? static_cast<size_t>(k) : 0]; }
  bool keeps_passes() const {
    return backward_ && (second_order_ || !shared_.learned_rates.empty() || request_.support_weight != 0);
  }
  T* theta_storage(int64_t k) { return thetas_[backward_ ? static_cast<size_t>(k) - 1 : 0]; }

  std::array<int, 2> parameters_of(size_t l) const { return {chain_[l].weight, chain_[l].bias}; }

  View parameter_at(int p, int64_t k) {
    if (k > 0 && request_.is_adapted(p)) return {theta_storage(k) + offset(p) * L, false};
    if (argument(p).per_task) return {initial_ + offset(p) * L, false};
    return {argument(p).data, true};
  }

  Rate rate_at(int p, int64_t k) const {
    const RateArgument<T>& rate = at(request_.rates, p);
    const int64_t width = rate.per_element ? shared_.size(p) : 1;
    return {rate.data + (rate.per_step ? k : 0) * width, rate.per_element ? 1 : 0};
  }

  void allocate(Arena& arena) {
    const auto take = [&](int64_t count) { return arena.take<T>(count * L); };
    const int64_t K = request_.steps, size = shared_.parameters_size;
    const int64_t S = request_.support.count, Q = request_.query.x ? request_.query.count : 0;
    const int64_t outputs = chain_.back().outputs, inputs = chain_.front().inputs;
    for (auto [loaded, samples] : {std::pair{&support_, S}, std::pair{&query_, Q}}) {
      *loaded = {samples, take(inputs * samples), take(outputs * samples), take(samples)};
    }
    const auto add_layers = [&](Pass& pass, size_t begin, size_t end, bool with_curvature) {
      for (size_t l = begin; l < end; ++l) {
        const int64_t count = chain_[l].outputs * pass.samples;
        pass.y[l] = take(count);
        pass.dz[l] = take(count);
        if (!chain_[l].is_smooth()) continue;
        pass.slope[l] = take(count);
        if (with_curvature) pass.curvature[l] = take(count);
      }
    };
    const auto make_fixed = [&](Pass& pass, const Loaded& loaded) {
      pass = Pass(layers_);
      pass.samples = loaded.count;
      pass.x = loaded.x;
      add_layers(pass, 0, fixed_layers_, false);
    };
    make_fixed(fixed_support_, support_);
    make_fixed(fixed_query_, query_);
    const auto make_moving = [&](const Pass& fixed, bool with_curvature) {
      Pass pass = fixed;
      std::ranges::fill(pass.dz, nullptr);
      add_layers(pass, fixed_layers_, layers_, with_curvature);
      if (fixed_layers_ == layers_) pass.dz.back() = take(outputs * pass.samples);
      if (request_.loss == LossKind::cross_entropy) pass.probabilities = take(outputs * pass.samples);
      return pass;
    };
    const int64_t passes = keeps_passes() ? std::max<int64_t>(K, 1) : 1;
    for (int64_t k = 0; k < passes; ++k) supports_.push_back(make_moving(fixed_support_, second_order_));
    query_pass_ = make_moving(fixed_query_, false);
    if (second_order_) {
      tangent_ = Pass(layers_);
      tangent_.samples = S;
      // The tangent's slope holds ż of a smooth layer.
      add_layers(tangent_, fixed_layers_, layers_, false);
    }

    const int64_t thetas = backward_ ? K : std::min<int64_t>(K, 1);
    for (int64_t k = 0; k < thetas; ++k) thetas_.push_back(take(size));
    initial_ = take(size);
    if (backward_) v_ = take(size);
    if (second_order_) direction_ = take(size);
    int64_t widest = 0, largest = 0;
    for (const ChainLayer& layer : chain_) {
      widest = std::max(widest, layer.outputs);
      largest = std::max({largest, layer.outputs * layer.inputs, layer.outputs * std::max(S, Q)});
    }
    scratch_ = take(largest);
    zeros_ = take(widest);
    bias_ = take(widest);
    std::fill_n(zeros_, widest * L, T(0));
    rate_gradients_.assign(request_.parameters.size(), nullptr);
    for (const int p : shared_.learned_rates) at(rate_gradients_, p) = take(shared_.rate_size(p));
  }

  // --- a chunk's start and end -------------------------------------------------------------------

  void start(int64_t first, int64_t count) {
    first_ = first;
    count_ = count;
    task_loss_ = Lane{};
    for (size_t p = 0; p < request_.parameters.size(); ++p) {
      if (!request_.parameters[p].per_task) continue;
      const int64_t size = shared_.size(static_cast<int>(p));
      load_rows(request_.parameters[p].data + first * size, size, initial_ + offset(static_cast<int>(p)) * L);
    }
    if (v_) std::fill_n(v_, shared_.parameters_size * L, T(0));
    for (const int p : shared_.learned_rates) {
      std::fill_n(at(rate_gradients_, p), shared_.rate_size(p) * L, T(0));
    }
    load(request_.support, support_);
    load(request_.query, query_);
    for (Pass* pass : {&fixed_support_, &fixed_query_}) {
      forward(*pass, 0, 0, fixed_layers_);
      if (crosses_boundary()) std::fill_n(pass->dz[fixed_layers_ - 1], outputs_size(fixed_layers_ - 1, *pass), T(0));
    }
  }

  int64_t outputs_size(size_t l, const Pass& pass) const { return chain_[l].outputs * pass.samples * L; }

  // Rows of size numbers, one for each task, to lanes. Lanes without a task are 0.
  void load_rows(const T* from, int64_t size, T* to) const {
    for (int64_t e = 0; e < size; ++e) {
      for (int64_t lane = 0; lane < L; ++lane) to[e * L + lane] = lane < count_ ? from[lane * size + e] : T(0);
    }
  }

  // A sample that does not count is 0 with weight 0, so that nothing of it, not even NaN, gets anywhere.
  void load(const Samples<T>& from, Loaded& to) const {
    const int64_t N = to.count, inputs = chain_.front().inputs, outputs = chain_.back().outputs;
    const T even = request_.label_smoothing / static_cast<T>(outputs);
    for (int64_t lane = 0; lane < L; ++lane) {
      const bool* mask = from.mask && lane < count_ ? from.mask + (first_ + lane) * N : nullptr;
      int64_t valid = 0;
      for (int64_t n = 0; n < N; ++n) {
        const bool counts = lane < count_ && (!mask || mask[n]);
        const int64_t index = (first_ + lane) * N + n;
        valid += counts;
        to.weights[n * L + lane] = counts ? T(1) : T(0);
        T* x = to.x + n * L + lane;
        for (int64_t i = 0; i < inputs; ++i) x[i * N * L] = counts ? from.x[index * inputs + i] : T(0);
        T* target = to.targets + n * L + lane;
        for (int64_t o = 0; o < outputs; ++o) {
          T value = 0;
          if (counts && from.targets) value = from.targets[index * outputs + o];
          if (counts && from.labels) value = even + (o == from.labels[index] ? 1 - request_.label_smoothing : T(0));
          target[o * N * L] = value;
        }
      }
      for (int64_t n = 0; n < N; ++n) to.weights[n * L + lane] /= static_cast<T>(std::max<int64_t>(valid, 1));
    }
  }

  void write_logits() {
    if (!request_.logits) return;
    const int64_t N = query_.count, outputs = chain_.back().outputs;
    const T* y = query_pass_.y[layers_ - 1];
    for (int64_t lane = 0; lane < count_; ++lane) {
      T* to = request_.logits + (first_ + lane) * N * outputs;
      for (int64_t n = 0; n < N; ++n) {
        const bool counts = query_.weights[n * L + lane] != 0;
        for (int64_t o = 0; o < outputs; ++o) to[n * outputs + o] = counts ? y[(o * N + n) * L + lane] : T(0);
      }
    }
  }

  // Results that belong to one task alone.
  void write_own_results() {
    if (request_.task_losses) std::memcpy(request_.task_losses + first_, &task_loss_, sizeof(T) * size_t(count_));
    for (size_t p = 0; p < request_.adapted.size(); ++p) {
      if (request_.adapted[p]) write_rows(static_cast<int>(p), request_.adapted[p]);
    }
    for (const int p : shared_.results) {
      if (!argument(p).per_task) continue;
      const int64_t size = shared_.size(p);
      const T* v = v_ + offset(p) * L;
      T* to = at(request_.gradients, p) + first_ * size;
      for (int64_t lane = 0; lane < count_; ++lane) {
        for (int64_t e = 0; e < size; ++e) to[lane * size + e] = request_.gradient_scale * v[e * L + lane];
      }
    }
  }

  void write_rows(int p, T* to) {
    const View theta = parameter_at(p, request_.steps);
    const int64_t size = shared_.size(p);
    for (int64_t lane = 0; lane < count_; ++lane) {
      for (int64_t e = 0; e < size; ++e) {
        to[(first_ + lane) * size + e] = theta.shared ? theta.data[e] : theta.data[e * L + lane];
      }
    }
  }

  static void add_lanes(const T* from, int64_t size, T* total) {
    for (int64_t e = 0; e < size; ++e) {
      T* to = total + e * L;
      store_lanes<T, L>(to, load_lanes<T, L>(to) + load_lanes<T, L>(from + e * L));
    }
  }

  // --- products ----------------------------------------------------------------------------------

  const T* input_of(const Pass& pass, size_t l) const { return l == 0 ? pass.x : pass.y[l - 1]; }

  GradientSource primal_source(const Pass& pass, size_t l) const { return {pass.dz[l], input_of(pass, l)}; }

  // x·Wᵀ: p is the sample, q the output.
  LaneProduct<T> through(size_t l, int64_t N, const T* x, const View& weight) const {
    const int64_t w = weight.shared ? 1 : L, inputs = chain_[l].inputs;
    return {x, L, N * L, weight.data, inputs * w, w, inputs};
  }

  // dz·W: p is the sample, q the input.
  LaneProduct<T> back_through(size_t l, int64_t N, const T* dz, const View& weight) const {
    const int64_t w = weight.shared ? 1 : L;
    return {dz, L, N * L, weight.data, w, chain_[l].inputs * w, chain_[l].outputs};
  }

  // dzᵀ·x: p is the output, q the input.
  LaneProduct<T> outer(int64_t N, const GradientSource& source) const {
    if (!source.dz || !source.x) return {};
    return {source.dz, N * L, L, source.x, N * L, L, N};
  }

  template <class First, class Last>
  void products(bool shared, int64_t P, int64_t Q, const LaneProduct<T>& one, const LaneProduct<T>& two, First first,
                Last last) const {
    shared ? lane_products<T, L, true>(P, Q, one, two, first, last)
           : lane_products<T, L, false>(P, Q, one, two, first, last);
  }

  // Calls update(element, gradient) for every element of a parameter: of the weight Σₙ δ₁x₁ᵀ + δ₂x₂ᵀ, of the bias Σₙ
  // δ₁.
  template <class Update>
  void for_gradient(int p, int64_t N, const GradientSource& one, const GradientSource& two, const Update update) const {
    const ChainLayer& layer = chain_[shared_.layer_of(p)];
    if (p == layer.weight) {
      const int64_t inputs = layer.inputs;
      lane_products<T, L, false>(
          layer.outputs, inputs, outer(N, one), outer(N, two), [](int64_t) { return Lane{}; },
          [=](int64_t o, int64_t i, Lane g) { update(o * inputs + i, g); });
      return;
    }
    for (int64_t o = 0; o < layer.outputs; ++o) {
      Lane sum{};
      for (int64_t n = 0; n < N; ++n) sum += load_lanes<T, L>(one.dz + (o * N + n) * L);
      update(o, sum);
    }
  }

  // v += scale · the gradients of what is tracked in layers begin … end − 1.
  void add_gradients(const Pass& pass, size_t begin, size_t end, T scale) const {
    for (size_t l = begin; l < end; ++l) {
      for (const int p : parameters_of(l)) {
        if (!is_tracked(p)) continue;
        for_gradient(p, pass.samples, primal_source(pass, l), {}, AddScaled{v_ + offset(p) * L, scale});
      }
    }
  }

  // --- through the layers ------------------------------------------------------------------------

  // The bias of a layer as lanes; of a layer without one, zeros.
  const T* bias_at(size_t l, int64_t k) {
    if (chain_[l].bias < 0) return zeros_;
    const View bias = parameter_at(chain_[l].bias, k);
    if (!bias.shared) return bias.data;
    for (int64_t o = 0; o < chain_[l].outputs; ++o) store_lanes<T, L>(bias_ + o * L, spread<T, L>(bias.data[o]));
    return bias_;
  }

  void forward(Pass& pass, int64_t k, size_t begin, size_t end) {
    const int64_t N = pass.samples;
    for (size_t l = begin; l < end; ++l) {
      const View weight = parameter_at(chain_[l].weight, k);
      products(
          weight.shared, N, chain_[l].outputs, {}, through(l, N, input_of(pass, l), weight),
          [bias = bias_at(l, k)](int64_t o) { return load_lanes<T, L>(bias + o * L); },
          [y = pass.y[l], N, below = negative_slope(l)](int64_t n, int64_t o, Lane z) {
            store_lanes<T, L>(y + (o * N + n) * L, z > 0 ? z : below * z);
          });
      if (chain_[l].is_smooth()) {
        apply_smooth(*chain_[l].activation, outputs_size(l, pass), pass.y[l], pass.slope[l], pass.curvature[l]);
      }
    }
  }

  // Gradients at z of layers top … bottom from dz of the top one.
  void backward(Pass& pass, int64_t k, size_t top, size_t bottom) {
    for (size_t l = top; l > bottom; --l) {
      const View weight = parameter_at(chain_[l].weight, k);
      backward_products(pass, l, {}, back_through(l, pass.samples, pass.dz[l], weight), weight.shared, pass.dz[l - 1]);
      to_z(pass, l - 1);
    }
  }

  // The gradient at the input of layer l, times f′ of the layer below where that is piecewise linear.
  void backward_products(const Pass& pass, size_t l, const LaneProduct<T>& one, const LaneProduct<T>& two, bool shared,
                         T* to) const {
    const int64_t N = pass.samples;
    products(
        shared, N, chain_[l].inputs, one, two, [](int64_t) { return Lane{}; },
        [to, y = pass.y[l - 1], N, below = negative_slope(l - 1)](int64_t n, int64_t i, Lane g) {
          const int64_t at = (i * N + n) * L;
          store_lanes<T, L>(to + at, load_lanes<T, L>(y + at) > 0 ? g : below * g);
        });
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

  // What arrives at the fixed layers from the lowest moving one, times scale, is added to their dz: gradients as they
  // are, and tangents of gradients (with dz·Ẇ as moving), since the fixed layers have none of their own.
  void cross_boundary(const Pass& pass, int64_t k, const LaneProduct<T>& moving, T scale, Pass& fixed) {
    if (!crosses_boundary()) return;
    const size_t l = fixed_layers_;
    const T* arriving = pass.dz.back();
    if (l < layers_) {
      const View weight = parameter_at(chain_[l].weight, k);
      backward_products(fixed, l, moving, back_through(l, pass.samples, pass.dz[l], weight), weight.shared, scratch_);
      arriving = scratch_;
    }
    const T* slope = l < layers_ ? fixed.slope[l - 1] : nullptr;
    T* to = fixed.dz[l - 1];
    for (int64_t i = 0, size = outputs_size(l - 1, fixed); i < size; ++i) {
      to[i] += scale * arriving[i] * (slope ? slope[i] : T(1));
    }
  }

  // --- the tangents ------------------------------------------------------------------------------

  // Where all that moves is adapted with one α, v itself, scaled by α; else α ⊙ v.
  Direction direction_at(int64_t k) {
    if (shared_.has_one_rate(k)) return {v_, *rate_at(shared_.adapted[0], k).data};
    for (const int p : shared_.adapted) {
      const Rate rate = rate_at(p, k);
      const T* v = v_ + offset(p) * L;
      T* to = direction_ + offset(p) * L;
      for (int64_t e = 0; e < shared_.size(p); ++e) {
        store_lanes<T, L>(to + e * L, rate.data[e * rate.stride] * load_lanes<T, L>(v + e * L));
      }
    }
    return {direction_, T(1)};
  }

  // ẏ of the moving layers: ż = x·Ẇᵀ + ẋ·Wᵀ + ḃ, ẏ = f′(z) ⊙ ż.
  void forward_tangent(const Pass& pass, int64_t k, const Direction& direction) {
    const int64_t N = pass.samples;
    for (size_t l = fixed_layers_; l < layers_; ++l) {
      const ChainLayer& layer = chain_[l];
      LaneProduct<T> one, two;
      if (request_.is_adapted(layer.weight)) {
        one = through(l, N, input_of(pass, l), {direction.data + offset(layer.weight) * L, false});
      }
      const View weight = parameter_at(layer.weight, k);
      if (l > fixed_layers_) two = through(l, N, tangent_.y[l - 1], weight);
      const bool bias_moves = layer.bias >= 0 && request_.is_adapted(layer.bias);
      products(
          weight.shared, N, layer.outputs, one, two,
          [bias = bias_moves ? direction.data + offset(layer.bias) * L : zeros_](int64_t o) {
            return load_lanes<T, L>(bias + o * L);
          },
          [to = tangent_.y[l], y = pass.y[l], N, below = negative_slope(l)](int64_t n, int64_t o, Lane z) {
            const int64_t at = (o * N + n) * L;
            store_lanes<T, L>(to + at, load_lanes<T, L>(y + at) > 0 ? z : below * z);
          });
      if (!layer.is_smooth()) continue;
      std::copy_n(tangent_.y[l], outputs_size(l, pass), tangent_.slope[l]);
      for (int64_t i = 0, size = outputs_size(l, pass); i < size; ++i) tangent_.y[l][i] *= pass.slope[l][i];
    }
  }

  // dz·Ẇ of layer l, if its weight moves.
  LaneProduct<T> back_along(const Pass& pass, const Direction& direction, size_t l) const {
    const int weight = chain_[l].weight;
    if (!request_.is_adapted(weight)) return {};
    return back_through(l, pass.samples, pass.dz[l], {direction.data + offset(weight) * L, false});
  }

  // dż of layer l − 1 from that of l: dẋ = dz·Ẇ + dż·W.
  void backward_tangent(const Pass& pass, int64_t k, const LaneProduct<T>& moving, size_t l) {
    const View weight = parameter_at(chain_[l].weight, k);
    const LaneProduct<T> still = back_through(l, pass.samples, tangent_.dz[l], weight);
    backward_products(pass, l, moving, still, weight.shared, tangent_.dz[l - 1]);
    tangent_to_z(pass, l - 1);
  }

  // dż = f′(z) ⊙ dẏ + f″(z) ⊙ dy ⊙ ż
  void tangent_to_z(const Pass& pass, size_t l) const {
    if (!chain_[l].is_smooth()) return;
    T* dz = tangent_.dz[l];
    const T *slope = pass.slope[l], *curvature = pass.curvature[l], *z = tangent_.slope[l];
    for (int64_t i = 0, size = outputs_size(l, pass); i < size; ++i) dz[i] = slope[i] * dz[i] + curvature[i] * z[i];
  }

  // --- the loss ----------------------------------------------------------------------------------

  // The mean loss over each task's valid samples, and into dz of the top layer its gradient times scale.
  Lane loss_of(Pass& pass, const Loaded& samples, T scale, bool value_wanted, bool gradient_wanted) {
    const LaneLoss<T, L> loss{request_.loss, chain_.back().outputs, pass.samples};
    const Lane value = loss.value(pass.y.back(), samples.targets, samples.weights, scale, value_wanted,
                                  pass.probabilities, gradient_wanted ? pass.dz.back() : nullptr);
    if (gradient_wanted) through_top(pass, pass.dz.back());
    if (gradient_wanted) to_z(pass, layers_ - 1);
    return value;
  }

  void loss_tangent(const Pass& pass) {
    const LaneLoss<T, L> loss{request_.loss, chain_.back().outputs, pass.samples};
    loss.tangent(pass.probabilities, support_.weights, tangent_.y.back(), tangent_.dz.back());
    through_top(pass, tangent_.dz.back());
    tangent_to_z(pass, layers_ - 1);
  }

  // f′ of a piecewise linear activation after the last layer.
  void through_top(const Pass& pass, T* dz) const {
    const T below = negative_slope(layers_ - 1);
    if (below == 1) return;
    const T* y = pass.y.back();
    for (int64_t i = 0, size = outputs_size(layers_ - 1, pass); i < size; ++i) {
      if (!(y[i] > 0)) dz[i] *= below;
    }
  }

  T negative_slope(size_t l) const { return static_cast<T>(chain_[l].negative_slope()); }

  LanesShared<T>& shared_;
  const Request<T>& request_;
  const std::vector<ChainLayer>& chain_;
  const size_t layers_, fixed_layers_;
  const bool backward_, second_order_;

  Loaded support_, query_;
  Pass fixed_support_, fixed_query_, query_pass_, tangent_;
  std::vector<Pass> supports_;  // by k, or one
  std::vector<T*> thetas_;      // θ₁ … θ_K, or the latest
  T* initial_ = nullptr;        // θ₀ where each task has its own
  T* v_ = nullptr;
  T* direction_ = nullptr;
  T *scratch_ = nullptr, *zeros_ = nullptr, *bias_ = nullptr;
  std::vector<T*> rate_gradients_;  // by parameter

  int64_t first_ = 0, count_ = 0;  // the tasks at hand
  Lane task_loss_{}, support_loss_{};
};

}  // namespace innerloop::INNERLOOP_ISA
