// One thread's executor of the recurrence over a vector of tasks: see recurrence.h for what its operations mean.
//
// Of the chain's layers, those below the lowest adapted one are fixed: they are passed once per set of samples, and
// what the gradients leave at their upper end goes down through them once, at the end. The others move with the inner
// steps. descend() multiplies δ·xᵀ and subtracts it in one go, so gₖ is never stored.
#pragma once

#include <algorithm>
#include <cstring>
#include <utility>
#include <vector>

#include "engine/arena.h"
#include "engine/lane_chain.h"
#include "engine/lane_tasks.h"
#include "engine/lanes_shared.h"
#include "engine/recurrence.h"

namespace innerloop::INNERLOOP_ISA {

template <class T>
class LaneExecutor {
  static constexpr int L = lane_count<T>;
  using Lane = Lanes<T, L>;
  using Pass = LanePass<T>;
  using Theta = LaneTheta<T>;
  using Direction = LaneDirection<T>;

 public:
  LaneExecutor(LanesShared<T>& shared, Arena& arena)
      : shared_(shared),
        request_(shared.request),
        layers_(shared.chain.size()),
        fixed_layers_(shared.fixed_layers),
        backward_(request_.wants_gradients()),
        second_order_(backward_ && !request_.first_order),
        chain_(shared, arena) {
    allocate(arena);
  }

  void run(const LaneTasks<T>& tasks) {
    tasks_ = tasks;
    start();
    run_request(*this, request_);
    write_own_results();
  }

  // Adds what the last run found to the results that are sums over tasks.
  void add_shared() const {
    for (const int p : shared_.results) {
      if (!argument(p).per_task) add_up(v_ + offset(p), shared_.size(p), at(request_.gradients, p));
    }
    for (const int p : shared_.learned_rates) {
      add_up(at(rate_gradients_, p), shared_.rate_size(p), at(request_.rate_gradients, p));
    }
  }

  // --- the operations of the recurrence ---------------------------------------------------------

  void support_pass(int64_t k) {
    Pass& pass = support_pass_of(k);
    chain_.forward(pass, theta(k), fixed_layers_, layers_);
    const bool value_wanted = k == 0 && request_.support_weight != 0;
    const Lane loss = chain_.loss(pass, support_, T(1), value_wanted, true);
    if (value_wanted) support_loss_ = loss;
    chain_.backward(pass, theta(k), layers_ - 1, fixed_layers_);
  }

  void descend(int64_t k) {
    for (const int p : shared_.adapted) {
      const Rate rate = rate_at(p, k);
      const LaneView<T> current = theta(k).at(p);
      T* to = theta_storage(k + 1) + offset(p);
      if (request_.proximal != 0 && k > 0) pull_to_initial(p, rate, to);  // θ_k and θ_{k+1} are in one place
      const auto update = [&]<bool shared>() {
        chain_.for_gradient(p, support_pass_of(k), [=, from = current.data](int64_t e, Lane g) {
          const Lane old = read<T, L, shared>(from + e * (shared ? 1 : L));
          store_lanes<T, L>(to + e * L, old - rate.data[e * rate.stride] * g);
        });
      };
      current.shared ? update.template operator()<true>() : update.template operator()<false>();
    }
  }

  void add_support_loss(T u) { task_loss_ += u * support_loss_; }

  void query_pass(int64_t k, T weight, bool backward_too) {
    if (query_.rows == 0) return;
    chain_.forward(query_pass_, theta(k), fixed_layers_, layers_);
    const Lane loss = chain_.loss(query_pass_, query_, weight, true, backward_too);
    if (weight != 0) task_loss_ += weight * loss;
    if (k == request_.steps && request_.logits) {
      const int64_t outputs = shared_.chain.back().outputs;
      query_.store_outputs(tasks_, query_pass_.y.back(), request_.query.count, outputs, request_.logits);
    }
    if (!backward_too) return;
    chain_.backward(query_pass_, theta(k), layers_ - 1, fixed_layers_);
    chain_.add_gradients(query_pass_, fixed_layers_, layers_, T(1), v_);
    cross_boundary(query_pass_, k, {}, T(1), fixed_query_);
  }

  void add_rate_gradient(int64_t k) {
    for (const int p : shared_.learned_rates) {
      chain_.for_gradient(p, support_pass_of(k),
                          [to = scratch_](int64_t e, Lane g) { store_lanes<T, L>(to + e * L, g); });
      const RateArgument<T>& rate = at(request_.rates, p);
      const int64_t size = shared_.size(p);
      T* to = at(rate_gradients_, p) + (rate.per_step ? k : 0) * (rate.per_element ? size : 1) * L;
      const T* v = v_ + offset(p);
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
    add_product(k, direction, -direction.scale);
  }

  void add_hessian_product() {
    if (fixed_layers_ == layers_) return;
    for (const int p : shared_.adapted) {
      tasks_.load(at(request_.directions, p), shared_.size(p), direction_ + offset(p));
    }
    add_product(0, {direction_, T(1)}, T(1));
  }

  void add_support_gradient(T u) {
    const Pass& pass = support_pass_of(0);
    chain_.add_gradients(pass, fixed_layers_, layers_, u, v_);
    cross_boundary(pass, 0, {}, u, fixed_support_);
  }

  // What has arrived at the boundary goes down through the fixed layers.
  void finish() {
    if (!crosses_boundary()) return;
    for (Pass* pass : {&fixed_support_, &fixed_query_}) {
      if (pass->samples == 0) continue;
      chain_.backward(*pass, theta(0), fixed_layers_ - 1, shared_.lowest_tracked);
      chain_.add_gradients(*pass, shared_.lowest_tracked, fixed_layers_, T(1), v_);
    }
  }

 private:
  // α at one step: of an element, or with stride 0 of all of them.
  struct Rate {
    const T* data;
    int64_t stride;
  };

  // v ← v + scale · H_support(θ_k)·direction, after the support pass.
  void add_product(int64_t k, const Direction& direction, T scale) {
    const Pass& pass = support_pass_of(k);
    chain_.forward_tangent(pass, theta(k), direction, tangent_);
    chain_.loss_tangent(pass, support_, tangent_);
    for (size_t l = layers_ - 1;; --l) {
      // Before v changes, which may be the direction itself.
      const LaneProduct<T> moving = chain_.back_along(pass, direction, l);
      if (l > fixed_layers_) {
        chain_.backward_tangent(pass, theta(k), moving, l, tangent_);
      } else {
        cross_boundary(tangent_, k, moving, scale, fixed_support_);
      }
      chain_.add_gradient_tangents(pass, tangent_, l, scale, v_);
      if (l == fixed_layers_) break;
    }
  }

  // θ_k ← θ_k − α λ(θ_k − θ₀)
  void pull_to_initial(int p, const Rate& rate, T* theta_k) const {
    const LaneView<T> initial = theta(0).at(p);
    for (int64_t e = 0; e < shared_.size(p); ++e) {
      const Lane from = initial.shared ? spread<T, L>(initial.data[e]) : load_lanes<T, L>(initial.data + e * L);
      const Lane current = load_lanes<T, L>(theta_k + e * L);
      store_lanes<T, L>(theta_k + e * L, current - rate.data[e * rate.stride] * request_.proximal * (current - from));
    }
  }

  // --- memory ----------------------------------------------------------------------------------

  // Of a parameter in arrays of lanes of all of them.
  int64_t offset(int parameter) const { return shared_.offset(parameter) * L; }
  const ParameterArgument<T>& argument(int parameter) const { return at(request_.parameters, parameter); }
  bool crosses_boundary() const { return shared_.lowest_tracked < fixed_layers_; }
  Pass& support_pass_of(int64_t k) { return supports_[keeps_passes() ? static_cast<size_t>(k) : 0]; }
  bool keeps_passes() const {
    return backward_ && (second_order_ || !shared_.learned_rates.empty() || request_.support_weight != 0);
  }
  T* theta_storage(int64_t k) const { return thetas_[backward_ ? static_cast<size_t>(k) - 1 : 0]; }
  Theta theta(int64_t k) const { return {shared_, initial_, k > 0 ? theta_storage(k) : nullptr}; }

  Rate rate_at(int p, int64_t k) const {
    const RateArgument<T>& rate = at(request_.rates, p);
    const int64_t width = rate.per_element ? shared_.size(p) : 1;
    return {rate.data + (rate.per_step ? k : 0) * width, rate.per_element ? 1 : 0};
  }

  void allocate(Arena& arena) {
    const std::vector<ChainLayer>& chain = shared_.chain;
    const auto take = [&](int64_t count) { return arena.take<T>(count * L); };
    const int64_t K = request_.steps, size = shared_.parameters_size;
    const int64_t S = request_.support.count, Q = request_.query.x ? request_.query.count : 0;
    const int64_t outputs = chain.back().outputs, inputs = chain.front().inputs;
    for (auto [samples, count] : {std::pair{&support_, S}, std::pair{&query_, Q}}) {
      *samples = {count, take(inputs * count), take(outputs * count), take(count)};
    }
    const auto add_layers = [&](Pass& pass, size_t begin, size_t end, bool with_curvature) {
      for (size_t l = begin; l < end; ++l) {
        const int64_t count = chain[l].outputs * pass.samples;
        pass.y[l] = take(count);
        pass.dz[l] = take(count);
        if (!chain[l].is_smooth()) continue;
        pass.slope[l] = take(count);
        if (with_curvature) pass.curvature[l] = take(count);
      }
    };
    const auto make_fixed = [&](const LaneSamples<T>& samples) {
      Pass pass(layers_);
      pass.samples = samples.rows;
      pass.x = samples.x;
      add_layers(pass, 0, fixed_layers_, false);
      return pass;
    };
    fixed_support_ = make_fixed(support_);
    fixed_query_ = make_fixed(query_);
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
      add_layers(tangent_, fixed_layers_, layers_, false);
    }

    const int64_t thetas = backward_ ? K : std::min<int64_t>(K, 1);
    for (int64_t k = 0; k < thetas; ++k) thetas_.push_back(take(size));
    if (std::ranges::any_of(request_.parameters, [](const auto& p) { return p.per_task; })) initial_ = take(size);
    if (backward_) v_ = take(size);
    if (second_order_) direction_ = take(size);
    int64_t largest = 0;
    for (const ChainLayer& layer : chain) {
      largest = std::max({largest, layer.outputs * layer.inputs, layer.outputs * std::max(S, Q)});
    }
    scratch_ = take(largest);
    rate_gradients_.assign(request_.parameters.size(), nullptr);
    for (const int p : shared_.learned_rates) at(rate_gradients_, p) = take(shared_.rate_size(p));
  }

  // --- a chunk's start and end -------------------------------------------------------------------

  void start() {
    task_loss_ = Lane{};
    for (size_t i = 0; i < request_.parameters.size(); ++i) {
      const int p = static_cast<int>(i);
      if (argument(p).per_task) tasks_.load(argument(p).data, shared_.size(p), initial_ + offset(p));
    }
    if (v_) std::fill_n(v_, shared_.parameters_size * L, T(0));
    for (const int p : shared_.learned_rates) {
      std::fill_n(at(rate_gradients_, p), shared_.rate_size(p) * L, T(0));
    }
    const int64_t inputs = shared_.chain.front().inputs, outputs = shared_.chain.back().outputs;
    support_.load(tasks_, request_.support, inputs, outputs, request_.label_smoothing);
    query_.load(tasks_, request_.query, inputs, outputs, request_.label_smoothing);
    const auto set_up = [&](Pass& pass, const LaneSamples<T>& samples) {
      pass.samples = samples.rows;
      pass.spread = tasks_.spread;
    };
    for (Pass& pass : supports_) set_up(pass, support_);
    set_up(fixed_support_, support_);
    set_up(tangent_, support_);
    set_up(fixed_query_, query_);
    set_up(query_pass_, query_);
    for (Pass* pass : {&fixed_support_, &fixed_query_}) {
      chain_.forward(*pass, theta(0), 0, fixed_layers_);
      if (!crosses_boundary()) continue;
      std::fill_n(pass->dz[fixed_layers_ - 1], chain_.outputs_size(fixed_layers_ - 1, *pass), T(0));
    }
  }

  // Results that belong to one task alone.
  void write_own_results() {
    const size_t count = static_cast<size_t>(tasks_.count);
    if (request_.task_losses) std::memcpy(request_.task_losses + tasks_.first, &task_loss_, sizeof(T) * count);
    for (const int p : shared_.adapted) {
      if (request_.adapted.empty()) break;
      // Without a step θ_K is θ₀, which may be shared.
      const LaneView<T> last = theta(request_.steps).at(p);
      T* to = at(request_.adapted, p);
      if (!last.shared) tasks_.store(last.data, shared_.size(p), T(1), to);
      for (int64_t task = 0; last.shared && task < tasks_.count; ++task) {
        std::copy_n(last.data, shared_.size(p), to + (tasks_.first + task) * shared_.size(p));
      }
    }
    for (const int p : shared_.adapted) {
      if (request_.products.empty()) break;
      tasks_.store(v_ + offset(p), shared_.size(p), T(1), at(request_.products, p));
    }
    for (const int p : shared_.results) {
      if (!argument(p).per_task) continue;
      tasks_.store(v_ + offset(p), shared_.size(p), request_.gradient_scale, at(request_.gradients, p));
    }
  }

  void add_up(const T* from, int64_t size, T* to) const {
    for (int64_t e = 0; e < size; ++e, from += L) {
      to[e] += request_.gradient_scale * (tasks_.spread ? *from : sum_lanes<T, L>(load_lanes<T, L>(from)));
    }
  }

  // What arrives at the fixed layers from the lowest moving one, times scale, is added to their dz: gradients as they
  // are, and tangents of gradients (with dz·Ẇ as moving), since the fixed layers have none of their own.
  void cross_boundary(const Pass& pass, int64_t k, const LaneProduct<T>& moving, T scale, Pass& fixed) {
    if (!crosses_boundary()) return;
    const size_t l = fixed_layers_;
    const T* arriving = pass.dz.back();
    if (l < layers_) {
      chain_.input_gradient(fixed, theta(k), l, moving, pass.dz[l], scratch_);
      arriving = scratch_;
    }
    const T* slope = l < layers_ ? fixed.slope[l - 1] : nullptr;
    T* to = fixed.dz[l - 1];
    for (int64_t i = 0, size = chain_.outputs_size(l - 1, fixed); i < size; ++i) {
      to[i] += scale * arriving[i] * (slope ? slope[i] : T(1));
    }
  }

  // Where all that moves is adapted with one α, v itself, scaled by α; else α ⊙ v.
  Direction direction_at(int64_t k) {
    if (shared_.has_one_rate(k)) return {v_, *rate_at(shared_.adapted[0], k).data};
    for (const int p : shared_.adapted) {
      const Rate rate = rate_at(p, k);
      const T* v = v_ + offset(p);
      T* to = direction_ + offset(p);
      for (int64_t e = 0; e < shared_.size(p); ++e) {
        store_lanes<T, L>(to + e * L, rate.data[e * rate.stride] * load_lanes<T, L>(v + e * L));
      }
    }
    return {direction_, T(1)};
  }

  LanesShared<T>& shared_;
  const Request<T>& request_;
  const size_t layers_, fixed_layers_;
  const bool backward_, second_order_;
  const LaneChain<T> chain_;

  LaneTasks<T> tasks_;
  LaneSamples<T> support_, query_;
  Pass fixed_support_, fixed_query_, query_pass_, tangent_;
  std::vector<Pass> supports_;  // by k, or one
  std::vector<T*> thetas_;      // θ₁ … θ_K, or the latest
  T* initial_ = nullptr;        // θ₀ where each task has its own
  T* v_ = nullptr;
  T* direction_ = nullptr;
  T* scratch_ = nullptr;
  std::vector<T*> rate_gradients_;  // by parameter
  Lane task_loss_{}, support_loss_{};
};

}  // namespace innerloop::INNERLOOP_ISA
