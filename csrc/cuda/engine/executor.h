// The executor of the recurrence on a GPU: see engine/recurrence.h for what its operations mean. Its unit of work is a
// chunk of tasks, which go through every layer together.
#pragma once

#include <algorithm>
#include <memory>
#include <vector>

#include "cuda/engine/each.h"
#include "cuda/engine/layer.h"
#include "cuda/engine/loss.h"
#include "cuda/engine/network.h"
#include "cuda/engine/parameter_kernels.h"
#include "cuda/engine/pass_memory.h"
#include "cuda/engine/samples.h"
#include "cuda/engine/workspace.h"

namespace innerloop::gpu {

template <class T>
class Executor {
 public:
  Executor(const Device& device, const Request<T>& request, int64_t capacity)
      : device_(device),
        request_(request),
        program_(*request.program),
        graph_(make_graph(request)),
        output_(program_.output),
        capacity_(capacity),
        loss_(device, request),
        kernels_(device),
        backward_(request.wants_gradients()),
        keeps_passes_(backward_ && !request.first_order) {
    const LayerContext<T> context{device_, request_, scratch_};
    for (const Step& step : graph_.steps) layers_.push_back(make_layer(step, context));
    for (const Step& step : graph_.steps) {
      for (const int p : step.parameters) {
        read_.push_back(p);
        if (request_.is_adapted(p)) adapted_.push_back(p);
        if (at(graph_.tracked, p)) tracked_.push_back(p);
        if (!request_.gradients.empty() && at(request_.gradients, p)) results_.push_back(p);
        const bool learns =
            request_.is_adapted(p) && !request_.rate_gradients.empty() && at(request_.rate_gradients, p);
        if (learns) learned_rates_.push_back(p);
      }
    }
  }

  // Hands out the memory, or with a workspace that has none finds out how much it is.
  void allocate(Workspace& workspace) {
    const int64_t K = request_.steps;
    const PassMemory<T> memory(program_, layers_, capacity_, workspace);
    const PassMaker<T, PassMemory<T>> make(graph_, request_, 0, memory);
    fixed_[0] = make.fixed(Side::support, request_.support.count);
    fixed_[1] = make.fixed(Side::query, request_.query.count);
    supports_.clear();
    const int64_t passes = keeps_passes_ ? std::max<int64_t>(K, 1) : 1;
    for (int64_t k = 0; k < passes; ++k) supports_.push_back(make.moving(fixed_[0]));
    query_ = make.moving(fixed_[1]);
    if (graph_.moving_statistics) statistics_ = make.moving(fixed_[0]);
    if (keeps_passes_) tangent_ = make.tangent(fixed_[0]);
    const int64_t most = std::max(request_.support.count, request_.query.count);
    for (T*& collected : collected_)
      collected = workspace.take<T>(capacity_ * most * largest_collected(program_, graph_));
    scratch_ = take_scratch(layers_, capacity_, most, workspace);

    thetas_.assign(1, take(read_, workspace));
    for (int64_t k = 0; k < (backward_ ? K : std::min<int64_t>(K, 1)); ++k) {
      thetas_.push_back(with(thetas_[0], take(adapted_, workspace)));
    }
    // g_k: all of them where an α is learned; else the latest, and g₀ to the end where u is not 0, since all of it, not
    // only of what is adapted, is then a part of the meta-gradient.
    gradients_.clear();
    const bool keeps_first = request_.support_weight != 0;
    const int64_t gradients = !learned_rates_.empty() ? K : keeps_first ? 2 : 1;
    for (int64_t k = 0; k < std::max<int64_t>(gradients, 1); ++k) {
      gradients_.push_back(take(backward_ && keeps_first && k == 0 ? tracked_ : adapted_, workspace));
    }
    v_ = take(backward_ ? tracked_ : std::vector<int>{}, workspace);
    direction_ = take(keeps_passes_ ? adapted_ : std::vector<int>{}, workspace);
    for (Targets<T>& side : targets_) side.valid = valid_[&side - targets_] = workspace.take<T>(capacity_);
    task_losses_ = workspace.take<double>(capacity_);
    support_losses_ = workspace.take<double>(capacity_);
    rate_sums_ = workspace.take<double>(capacity_ * static_cast<int64_t>(learned_rates_.size()));
  }

  void run_chunk(int64_t first) {
    first_ = first;
    tasks_ = std::min(capacity_, request_.tasks - first);
    start();
    run_request(*this, request_);
    store_results();
  }

  // After the last chunk: gradients of the mean over tasks.
  void scale_shared_results() {
    Operands scaled;
    for (const int p : results_) {
      if (!at(request_.parameters, p).per_task) scaled.push_back(in_place(at(request_.gradients, p), size_of(p)));
    }
    for (const int p : learned_rates_) scaled.push_back(in_place(at(request_.rate_gradients, p), rate_size(p)));
    kernels_.scale(1, request_.gradient_scale, scaled);
  }

  // --- the operations of the recurrence ---------------------------------------------------------

  void support_pass(int64_t k) {
    Pass<T>& pass = support_pass_of(k);
    // ∇L_support(θ₀) is a part of the meta-gradient where u is not 0: then all of it is wanted, not what is adapted
    // alone, and what arrives at the boundary counts.
    const bool whole = k == 0 && backward_ && request_.support_weight != 0;
    forward(Part::moving, theta_of(k), pass, nullptr);
    T* dy = pass.gradients[output_i()];
    loss_.value(tasks_, pass.values[output_i()], targets(pass), T(1), support_losses_, nullptr, dy);
    const Parameters<T>& gradient = gradient_of_step(k);
    clear(gradient);
    if (!graph_.moves[output_i()]) {
      if (whole && graph_.is_boundary(output_)) add_to_fixed(pass, output_, dy, request_.support_weight);
      return;
    }
    backward(Part::moving, theta_of(k), pass, nullptr, whole, request_.support_weight, gradient);
  }

  void descend(int64_t k) {
    const Parameters<T>& from = theta_of(k);
    const Parameters<T>& to = theta_of(k + 1);
    const Parameters<T>& gradient = gradient_of_step(k);
    Operands operands;
    for (const int p : adapted_) {
      Operand<T> o = with_rate(p, k);
      o.to = at(to, p);
      o.from = at(from, p);
      o.other = at(gradient, p);
      o.initial = at(thetas_[0], p);
      operands.push_back(o);
    }
    kernels_.descend(tasks_, request_.proximal, operands);
  }

  void add_support_loss(T u) {
    each(device_, tasks_, AddScaledValues<double>{support_losses_, static_cast<double>(u), task_losses_});
  }

  void query_pass(int64_t k, T weight, bool backward_too) {
    if (request_.query.x == nullptr) return;
    Pass<T>* statistics = nullptr;
    if (graph_.moving_statistics) {
      statistics = &statistics_;
      forward(Part::moving, theta_of(k), statistics_, nullptr);
    }
    forward(Part::moving, theta_of(k), query_, statistics ? statistics : &fixed(Side::support));
    T* y = query_.values[output_i()];
    T* dy = backward_too ? query_.gradients[output_i()] : nullptr;
    if (weight != 0) loss_.value(tasks_, y, targets(query_), weight, nullptr, task_losses_, dy);
    if (k == request_.steps && request_.logits) {
      const int64_t outputs = program_.values[output_i()].channels, samples = request_.query.count;
      each(device_, tasks_ * samples * outputs,
           StoreLogits<T>{y, targets(query_).mask, outputs, request_.logits + first_ * samples * outputs});
    }
    if (!backward_too) return;
    if (!graph_.moves[output_i()]) {
      if (graph_.is_boundary(output_)) add_to_fixed(query_, output_, dy, T(1));
      return;
    }
    backward(Part::moving, theta_of(k), query_, statistics, true, T(1), v_);
    if (statistics) {  // what the query found in the support set's statistics goes back through the support pass
      each(device_, value_size(output_, statistics_), Zero<T>{statistics_.gradients[output_i()]});
      backward(Part::moving, theta_of(k), statistics_, nullptr, true, T(1), v_);
    }
  }

  void add_rate_gradient(int64_t k) {
    const Parameters<T>& gradient = gradient_of_step(k);
    Operands operands;
    for (const int p : learned_rates_) {
      Operand<T> o = with_rate(p, k);
      o.to = at(request_.rate_gradients, p) + rate_offset(p, k);
      o.from = at(v_, p);
      o.other = at(gradient, p);
      operands.push_back(o);
    }
    kernels_.subtract_rate_gradient(tasks_, operands, rate_sums_);
  }

  void subtract_hessian_product(int64_t k) {
    if (!graph_.moves[output_i()]) return;
    // Along −α ⊙ v, so that the product can be added to v as the layers find it.
    Operands operands;
    for (const int p : adapted_) {
      Operand<T> o = with_rate(p, k);
      o.to = at(direction_, p);
      o.from = at(v_, p);
      operands.push_back(o);
    }
    kernels_.scale_by_rate(tasks_, operands);
    add_product_along_direction(k);
  }

  void add_hessian_product() {
    if (!graph_.moves[output_i()]) return;
    Operands operands;
    for (const int p : adapted_) {
      operands.push_back(
          {.to = at(direction_, p), .from = at(request_.directions, p) + first_ * size_of(p), .size = size_of(p)});
    }
    kernels_.load(tasks_, operands);
    add_product_along_direction(0);
  }

  void add_support_gradient(T u) {
    Operands operands;
    for (const int p : tracked_) {
      operands.push_back({.to = at(v_, p), .from = at(gradient_of_step(0), p), .size = size_of(p)});
    }
    kernels_.add(tasks_, u, operands);
  }

  // What has arrived at the boundary goes through the fixed part; the query's first, since under bn = support it leaves
  // something in the support set's statistics.
  void finish() {
    if (graph_.boundary.empty()) return;
    const Parameters<T>& theta = thetas_[0];
    backward(Part::fixed, theta, fixed(Side::query), &fixed(Side::support), true, T(1), v_);
    backward(Part::fixed, theta, fixed(Side::support), nullptr, true, T(1), v_);
  }

 private:
  using Operands = typename ParameterKernels<T>::Operands;

  template <class E>
  static decltype(auto) at(E& each_one, int index) {
    return each_one[static_cast<size_t>(index)];
  }

  // --- memory ----------------------------------------------------------------------------------

  size_t output_i() const { return static_cast<size_t>(output_); }
  int64_t size_of(int p) const { return program_.parameter_size(p); }
  int64_t value_size(int value, const Pass<T>& pass) const {
    return tasks_ * pass.samples * program_.values[static_cast<size_t>(value)].size();
  }
  const Targets<T>& targets(const Pass<T>& pass) const { return targets_[static_cast<size_t>(pass.side)]; }
  Pass<T>& fixed(Side side) { return fixed_[static_cast<size_t>(side)]; }
  Pass<T>& support_pass_of(int64_t k) { return supports_[keeps_passes_ ? static_cast<size_t>(k) : 0]; }
  const Parameters<T>& theta_of(int64_t k) const { return thetas_[k == 0 || backward_ ? static_cast<size_t>(k) : 1]; }
  const Parameters<T>& gradient_of_step(int64_t k) const {
    if (!learned_rates_.empty()) return gradients_[static_cast<size_t>(k)];
    return gradients_[k > 0 && request_.support_weight != 0 ? 1 : 0];
  }

  Parameters<T> take(const std::vector<int>& which, Workspace& workspace) const {
    Parameters<T> taken(program_.parameters.size(), nullptr);
    for (const int p : which) at(taken, p) = workspace.take<T>(capacity_ * size_of(p));
    return taken;
  }

  // base, with others where there are any.
  static Parameters<T> with(Parameters<T> base, const Parameters<T>& others) {
    for (size_t p = 0; p < base.size(); ++p) {
      if (others[p]) base[p] = others[p];
    }
    return base;
  }

  // --- α ----------------------------------------------------------------------------------------

  const RateArgument<T>& rate(int p) const { return request_.rates[static_cast<size_t>(p)]; }
  int64_t rate_width(int p) const { return rate(p).per_element ? size_of(p) : 1; }
  int64_t rate_offset(int p, int64_t k) const { return rate(p).per_step ? k * rate_width(p) : 0; }
  int64_t rate_size(int p) const { return (rate(p).per_step ? request_.steps : 1) * rate_width(p); }

  Operand<T> with_rate(int p, int64_t k) const {
    return {.rate = rate(p).data + rate_offset(p, k), .size = size_of(p), .per_element = rate(p).per_element};
  }
  static Operand<T> in_place(T* data, int64_t size) { return {.to = data, .from = data, .size = size}; }

  // --- the start of a chunk, and its end ----------------------------------------------------------

  void start() {
    Operands operands;
    for (const int p : read_) {
      const ParameterArgument<T>& initial = request_.parameters[static_cast<size_t>(p)];
      operands.push_back({.to = at(thetas_[0], p),
                          .from = initial.per_task ? initial.data + first_ * size_of(p) : initial.data,
                          .size = size_of(p),
                          .is_shared = !initial.per_task});
    }
    kernels_.load(tasks_, operands);
    clear(v_);
    each(device_, tasks_, Zero<double>{task_losses_});
    load(Side::support, request_.support);
    if (request_.query.x) load(Side::query, request_.query);
  }

  void load(Side side, const Samples<T>& samples) {
    Pass<T>& pass = fixed(side);
    Targets<T>& to = targets_[static_cast<size_t>(side)];
    const Shape& input = program_.values[0];
    const int64_t outputs = program_.values[output_i()].channels, first = first_ * samples.count;
    to.samples = samples.count;
    to.mask = samples.mask ? samples.mask + first : nullptr;
    to.labels = samples.labels ? samples.labels + first : nullptr;
    to.values = samples.targets ? samples.targets + first * outputs : nullptr;
    each(device_, tasks_, CountValid<T>{to.mask, to.samples, valid_[static_cast<size_t>(side)]});
    each(device_, value_size(0, pass),
         LoadSamples<T>{samples.x + first * input.size(), to.mask, input.channels, input.height * input.width,
                        pass.values[0]});
    for (const int value : graph_.boundary) {
      if (T* gradient = pass.gradients[static_cast<size_t>(value)]) {
        each(device_, value_size(value, pass), Zero<T>{gradient});
      }
    }
    forward(Part::fixed, thetas_[0], pass, side == Side::query ? &fixed(Side::support) : nullptr);
  }

  void clear(const Parameters<T>& parameters) {
    Operands operands;
    for (const int p : read_) {
      if (at(parameters, p)) operands.push_back({.to = at(parameters, p), .size = size_of(p)});
    }
    kernels_.clear(tasks_, operands);
  }

  void store_results() {
    if (request_.task_losses) each(device_, tasks_, StoreLosses<T>{task_losses_, request_.task_losses + first_});
    Operands summed, scaled, copied;
    for (const int p : results_) {
      T* to = request_.gradients[static_cast<size_t>(p)];
      if (request_.parameters[static_cast<size_t>(p)].per_task) {
        scaled.push_back({.to = to + first_ * size_of(p), .from = at(v_, p), .size = size_of(p)});
      } else {
        summed.push_back({.to = to, .from = at(v_, p), .size = size_of(p)});
      }
    }
    for (const int p : read_) {
      const auto copy = [&](const std::vector<T*>& to, const Parameters<T>& from) {
        if (to.empty() || !to[static_cast<size_t>(p)]) return;
        copied.push_back(
            {.to = to[static_cast<size_t>(p)] + first_ * size_of(p), .from = at(from, p), .size = size_of(p)});
      };
      copy(request_.adapted, theta_of(request_.steps));
      copy(request_.products, v_);
    }
    kernels_.add_tasks(tasks_, summed);
    kernels_.scale(tasks_, request_.gradient_scale, scaled);
    kernels_.load(tasks_, copied);
  }

  // --- through the layers ------------------------------------------------------------------------

  Primal<T> primal(size_t s, const Pass<T>& pass, const Pass<T>* partner) const {
    const Step& step = graph_.steps[s];
    Primal<T> p;
    p.side = pass.side;
    p.tasks = tasks_;
    p.samples = pass.samples;
    p.mask = targets(pass).mask;
    p.valid = targets(pass).valid;
    for (size_t i = 0; i < step.inputs.size(); ++i) p.x[i] = at(pass.values, step.inputs[i]);
    p.y = at(pass.values, step.output);
    p.dy = at(pass.gradients, step.output);
    p.state = pass.states[s];
    p.partner = partner ? partner->states[s] : nullptr;
    return p;
  }

  void forward(Part part, const Parameters<T>& theta, Pass<T>& pass, const Pass<T>* partner) {
    for (size_t s = 0; s < graph_.steps.size(); ++s) {
      if (belongs(graph_.steps[s], part)) layers_[s]->forward(theta, primal(s, pass, partner));
    }
  }

  // Gradients of a part, from that of its last values, which are in place. whole: of all that is tracked, not only of
  // what is adapted; then what arrives at the boundary is added, times boundary_weight, to the fixed part's gradients.
  void backward(Part part, const Parameters<T>& theta, Pass<T>& pass, const Pass<T>* partner, bool whole,
                T boundary_weight, const Parameters<T>& gradient) {
    start_arrivals(part);
    for (size_t s = graph_.steps.size(); s-- > 0;) {
      const Step& step = graph_.steps[s];
      if (!belongs(step, part) || !arrived_[static_cast<size_t>(step.output)]) continue;
      Primal<T> p = primal(s, pass, partner);
      for (size_t i = 0; i < step.inputs.size(); ++i) {
        const size_t input = static_cast<size_t>(step.inputs[i]);
        if (whole ? graph_.has_tracked[input] : graph_.moves[input]) p.dx[i] = destination(step, i, part, pass);
      }
      layers_[s]->backward(theta, p, gradient);
      for (size_t i = 0; i < step.inputs.size(); ++i) collect(step, i, part, p.dx[i], boundary_weight, pass);
    }
  }

  void start_arrivals(Part part) {
    arrived_.assign(program_.values.size(), false);
    if (part == Part::moving) arrived_[output_i()] = true;
    if (part == Part::fixed) {
      for (const int value : graph_.boundary) arrived_[static_cast<size_t>(value)] = true;
    }
  }

  // Where a step's gradient for its input goes: to its place, if nothing has arrived there yet; else beside it.
  T* destination(const Step& step, size_t i, Part part, Pass<T>& pass) {
    const auto input = static_cast<size_t>(step.inputs[i]);
    const bool crosses = part == Part::moving && !graph_.moves[input];
    const bool twice = i == 1 && step.inputs[0] == step.inputs[1];
    return crosses || twice || arrived_[input] ? collected_[i] : pass.gradients[input];
  }

  void collect(const Step& step, size_t i, Part part, const T* arriving, T boundary_weight, Pass<T>& pass) {
    if (!arriving) return;
    const int input = step.inputs[i];
    if (part == Part::moving && !graph_.moves[static_cast<size_t>(input)]) {
      add_to_fixed(pass, input, arriving, boundary_weight);
    } else if (arriving == collected_[i]) {
      add_values(pass, input, arriving, T(1), pass);
    }
    arrived_[static_cast<size_t>(input)] = true;
  }

  void add_to_fixed(const Pass<T>& pass, int value, const T* arriving, T weight) {
    add_values(pass, value, arriving, weight, fixed(pass.side));
  }

  void add_values(const Pass<T>& pass, int value, const T* arriving, T weight, Pass<T>& to) {
    each(device_, value_size(value, pass),
         AddScaledValues<T>{arriving, weight, to.gradients[static_cast<size_t>(value)]});
  }

  // v ← v + H_support(θ_k)·direction, after the support pass.
  void add_product_along_direction(int64_t k) {
    Pass<T>& pass = support_pass_of(k);
    for (size_t s = 0; s < graph_.steps.size(); ++s) {
      if (!graph_.steps[s].moves) continue;
      layers_[s]->forward_tangent(theta_of(k), direction_, primal(s, pass, nullptr), tangent(s));
    }
    loss_.tangent(tasks_, pass.values[output_i()], tangent_.values[output_i()], targets(pass),
                  tangent_.gradients[output_i()]);
    start_arrivals(Part::moving);
    for (size_t s = graph_.steps.size(); s-- > 0;) {
      const Step& step = graph_.steps[s];
      if (!step.moves || !arrived_[static_cast<size_t>(step.output)]) continue;
      Tangent<T> t = tangent(s);
      for (size_t i = 0; i < step.inputs.size(); ++i) {
        if (graph_.has_tracked[static_cast<size_t>(step.inputs[i])]) {
          t.dx[i] = destination(step, i, Part::moving, tangent_);
        }
      }
      layers_[s]->backward_tangent(theta_of(k), direction_, primal(s, pass, nullptr), t, v_);
      for (size_t i = 0; i < step.inputs.size(); ++i) collect(step, i, Part::moving, t.dx[i], T(1), tangent_);
    }
  }

  Tangent<T> tangent(size_t s) const {
    const Step& step = graph_.steps[s];
    Tangent<T> t;
    for (size_t i = 0; i < step.inputs.size(); ++i) t.x[i] = at(tangent_.values, step.inputs[i]);
    t.y = at(tangent_.values, step.output);
    t.dy = at(tangent_.gradients, step.output);
    t.state = tangent_.states[s];
    return t;
  }

  const Device& device_;
  const Request<T>& request_;
  const Program& program_;
  const Graph graph_;
  const int output_;
  const int64_t capacity_;  // tasks of a chunk
  const TaskLoss<T> loss_;
  const ParameterKernels<T> kernels_;
  const bool backward_;      // gradients are wanted
  const bool keeps_passes_;  // … of second order: the support passes are kept for the way back
  Scratch<T> scratch_;
  std::vector<std::unique_ptr<Layer<T>>> layers_;  // by step
  // Parameters that some step reads, that the inner loop adapts, that v follows, whose gradient and whose α's gradient
  // is a result.
  std::vector<int> read_, adapted_, tracked_, results_, learned_rates_;

  Pass<T> fixed_[2];  // by side
  Pass<T> query_, statistics_, tangent_;
  std::vector<Pass<T>> supports_;  // by k
  Targets<T> targets_[2];
  T* valid_[2] = {};
  std::vector<Parameters<T>> thetas_;     // θ₀ … θ_K, or θ₀ and the latest; what is not adapted is θ₀'s
  std::vector<Parameters<T>> gradients_;  // g_k: see gradient_of_step
  Parameters<T> v_, direction_;           // direction: −α ⊙ v, of what is adapted
  T* collected_[2] = {};
  double *task_losses_ = nullptr, *support_losses_ = nullptr, *rate_sums_ = nullptr;
  std::vector<bool> arrived_;  // by value: its gradient has its first contribution
  int64_t first_ = 0, tasks_ = 0;
};

}  // namespace innerloop::gpu
