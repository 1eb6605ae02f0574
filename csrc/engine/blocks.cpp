#include "engine/blocks.h"

#include <algorithm>
#include <optional>

#include "engine/blocks_engine.h"
#include "engine/loss.h"
#include "engine/pass_memory.h"
#include "engine/recurrence.h"
#include "engine/task_samples.h"

namespace innerloop::INNERLOOP_ISA {
namespace {

// One thread's executor of the recurrence: see recurrence.h for what its operations mean.
template <class T>
class BlocksWorker final : public Worker {
 public:
  explicit BlocksWorker(BlocksEngine<T>& shared)
      : engine_(shared),
        request_(shared.request),
        plan_(shared.plan),
        layers_(make_layers(shared.plan, shared.request, memory_, scratch_of_convolutions_)),
        output_(request_.program->output),
        loss_(request_.loss, request_.label_smoothing, output_layout().shape.channels, output_layout().stride),
        support_samples_(request_.support, at(plan_.values, plan_.input), output_layout().shape.channels),
        query_samples_(request_.query, at(plan_.values, plan_.input), output_layout().shape.channels),
        backward_(request_.wants_gradients()),
        second_order_(backward_ && !request_.first_order),
        keeps_passes_(second_order_ && keeps_support_passes(plan_, request_, layers_)) {
    for (const std::unique_ptr<Layer<T>>& layer : layers_) {
      if (layer->owns_weight()) owners_.push_back(layer.get());
    }
    allocate();
  }

  void run(int64_t chunk) override {
    start_chunk();
    const int64_t first = chunk * engine_.tasks_per_chunk;
    for (task_ = first; task_ < std::min(first + engine_.tasks_per_chunk, request_.tasks); ++task_) {
      start_task();
      run_request(*this, request_);
      finish_task();
    }
  }

  void add_shared() override {
    if (!backward_) return;
    for (const int p : engine_.results) {
      if (at(request_.parameters, p).per_task) continue;
      const PackedParameter& parameter = at(plan_.parameters, p);
      add_scaled(sum_ + parameter.offset, parameter.packed_size(), T(1), engine_.total.data() + parameter.offset);
    }
    for (const int p : engine_.learned_rates) {
      std::vector<T>& total = at(engine_.rate_totals, p);
      add_scaled(at(rate_gradients_, p), static_cast<int64_t>(total.size()), T(1), total.data());
    }
  }

  // --- the operations of the recurrence ---------------------------------------------------------

  void support_pass(int64_t k) {
    Pass<T>& pass = support_pass_of(k);
    latest_support_pass_ = k;
    // ∇L_support(θ₀) is a part of the meta-gradient where u is not 0: then all of it is wanted, not what is adapted
    // alone, and what arrives at the boundary counts.
    const bool whole = k == 0 && backward_ && request_.support_weight != 0;
    forward(Part::moving, theta_of(k), k, pass, nullptr);
    T* dy = gradient_of_output(pass);
    support_loss_ = loss_.value(outputs(pass), support_samples_.targets(), pass.samples, T(1), dy);
    T* gradient = gradient_of_step(k);
    std::fill(gradient, gradient + plan_.moving_size, T(0));
    if (!plan_.moves[static_cast<size_t>(output_)]) {
      if (whole && plan_.is_boundary(output_)) {
        add_scaled(dy, dense_size(output_, pass.samples), request_.support_weight,
                   fixed(Side::support).gradients[output_i()]);
      }
      return;
    }
    backward(Part::moving, theta_of(k), k, pass, nullptr, whole, request_.support_weight, gradient);
  }

  void descend(int64_t k) {
    T* next = keeps_thetas() ? at(thetas_, static_cast<int>(k)) : thetas_[0];
    const T* current = theta_of(k);
    const T* gradient = gradient_of_step(k);
    if (next != current) std::copy(current, current + plan_.moving_size, next);
    for (const int p : engine_.adapted) {
      const PackedParameter& parameter = at(plan_.parameters, p);
      const RateAt<T> rate = at(engine_.rates, p).at(k);
      const T* g = gradient + parameter.offset;
      T* to = next + parameter.offset;
      const int64_t size = parameter.packed_size();
      if (request_.proximal != 0 && k > 0) {  // before `to` moves, which may be θ_k itself
        const T* from = initial_ + parameter.offset;
        for (int64_t i = 0; i < size; ++i) {
          to[i] -= (rate.elements ? rate.elements[i] : rate.number) * request_.proximal * (to[i] - from[i]);
        }
      }
      if (rate.elements) {
        for (int64_t i = 0; i < size; ++i) to[i] -= rate.elements[i] * g[i];
      } else {
        add_scaled(g, size, -rate.number, to);
      }
    }
    for (Layer<T>* owner : owners_) owner->descend(k);
  }

  void add_support_loss(T u) { task_loss_ += static_cast<double>(u) * support_loss_; }

  void query_pass(int64_t k, T weight, bool backward_too) {
    if (request_.query.x == nullptr) return;
    Pass<T>* statistics = nullptr;
    if (plan_.moving_statistics) {
      statistics = &statistics_;
      forward(Part::moving, theta_of(k), k, statistics_, nullptr);
    }
    forward(Part::moving, theta_of(k), k, query_, statistics ? statistics : &fixed(Side::support));
    T* dy = backward_too ? gradient_of_output(query_) : nullptr;
    const double loss = loss_.value(outputs(query_), query_samples_.targets(), query_.samples, weight, dy);
    if (weight != 0) task_loss_ += static_cast<double>(weight) * loss;
    if (k == request_.steps && request_.logits) {
      query_samples_.write_outputs(task_, outputs(query_), output_layout().stride, request_.logits);
    }
    if (!backward_too) return;
    if (!plan_.moves[output_i()]) {
      if (plan_.is_boundary(output_)) {
        add_scaled(dy, dense_size(output_, query_.samples), T(1), fixed(Side::query).gradients[output_i()]);
      }
      return;
    }
    backward(Part::moving, theta_of(k), k, query_, statistics, true, T(1), v_);
    if (statistics) {  // what the query found in the support set's statistics goes back through the support pass
      std::fill_n(statistics_.gradients[output_i()], dense_size(output_, statistics_.samples), T(0));
      backward(Part::moving, theta_of(k), k, statistics_, nullptr, true, T(1), v_);
    }
  }

  void add_rate_gradient(int64_t k) {
    const T* gradient = gradient_of_step(k);
    for (const int p : engine_.learned_rates) {
      const PackedParameter& parameter = at(plan_.parameters, p);
      const PackedRate<T>& rate = at(engine_.rates, p);
      T* to = at(rate_gradients_, p) + rate.row_of(k) * rate.width();
      if (const int owner = at(plan_.owners, p); owner >= 0) {
        *to += at(layers_, owner)->rate_gradient(k);
        continue;
      }
      const T* g = gradient + parameter.offset;
      const T* v = v_ + parameter.offset;
      const int64_t size = parameter.packed_size();
      if (rate.per_element()) {
        for (int64_t i = 0; i < size; ++i) to[i] -= v[i] * g[i];
      } else {
        double sum = 0;
        for (int64_t i = 0; i < size; ++i) sum += static_cast<double>(v[i] * g[i]);
        *to -= static_cast<T>(sum);
      }
    }
  }

  void subtract_hessian_product(int64_t k) {
    if (!plan_.moves[output_i()]) return;
    if (!keeps_passes_ && k != latest_support_pass_) repeat_support_pass(k);
    // Along −α ⊙ v, so that the product can be added to v as the layers find it.
    for (const int p : engine_.adapted) {
      const PackedParameter& parameter = at(plan_.parameters, p);
      const RateAt<T> rate = at(engine_.rates, p).at(k);
      const T* v = v_ + parameter.offset;
      T* to = direction_ + parameter.offset;
      for (int64_t i = 0; i < parameter.packed_size(); ++i) {
        to[i] = -(rate.elements ? rate.elements[i] : rate.number) * v[i];
      }
    }
    add_product_along_direction(k);
  }

  void add_hessian_product() {
    if (!plan_.moves[output_i()]) return;
    for (const int p : engine_.adapted) {
      const PackedParameter& parameter = at(plan_.parameters, p);
      pack(at(request_.directions, p) + task_ * parameter.size(), parameter, direction_);
    }
    add_product_along_direction(0);
  }

  void add_support_gradient(T u) {
    const T* gradient = gradient_of_step(0);
    for (const int p : engine_.tracked) {
      const PackedParameter& parameter = at(plan_.parameters, p);
      add_scaled(gradient + parameter.offset, parameter.packed_size(), u, v_ + parameter.offset);
    }
    for (Layer<T>* owner : owners_) owner->add_support_gradient(u);
  }

  // What has arrived at the boundary goes through the fixed part; the query's first, since under bn = support it leaves
  // something in the support set's statistics.
  void finish() {
    for (Layer<T>* owner : owners_) owner->finish_task(sum_);
    if (plan_.boundary.empty()) return;
    backward(Part::fixed, theta_of(0), 0, fixed(Side::query), &fixed(Side::support), true, T(1), v_);
    backward(Part::fixed, theta_of(0), 0, fixed(Side::support), nullptr, true, T(1), v_);
  }

 private:
  // --- memory ----------------------------------------------------------------------------------

  const ValueLayout& output_layout() const { return at(plan_.values, output_); }
  size_t output_i() const { return static_cast<size_t>(output_); }
  bool keeps_thetas() const { return backward_; }
  int64_t dense_size(int value, int64_t samples) const { return samples * at(plan_.values, value).dense_size(); }

  Pass<T>& fixed(Side side) { return side == Side::support ? fixed_support_ : fixed_query_; }
  Pass<T>& support_pass_of(int64_t k) { return supports_[keeps_passes_ ? static_cast<size_t>(k) : 0]; }
  const T* theta_of(int64_t k) const {
    if (k == 0) return initial_;
    return keeps_thetas() ? thetas_[static_cast<size_t>(k) - 1] : thetas_[0];
  }
  T* gradient_of_step(int64_t k) {
    if (!engine_.learned_rates.empty()) return gradients_[static_cast<size_t>(k)];
    return gradients_[k > 0 && request_.support_weight != 0 ? 1 : 0];  // g₀ is needed to the end where u is not 0
  }

  void allocate() {
    const int64_t K = request_.steps, S = request_.support.count, Q = request_.query.count;
    WalkMemory<T> walk(plan_, output_, std::max(S, Q), memory_);
    const PassMemory<T> of_fixed(plan_, layers_, memory_), of_query(plan_, layers_, memory_, &walk, &Reads::x),
        of_support(plan_, layers_, memory_, &walk, &Reads::x, second_order_ ? &Reads::dy : nullptr),
        of_tangent(plan_, layers_, memory_, &walk, &Reads::x_tangent);
    const bool in_place = support_samples_.in_place() && query_samples_.in_place();
    const auto make = [&](const PassMemory<T>& memory) {
      return PassMaker<T, PassMemory<T>>(plan_, request_, in_place ? std::nullopt : std::optional(plan_.input), memory);
    };
    fixed_support_ = make(of_fixed).fixed(Side::support, S);
    fixed_query_ = make(of_fixed).fixed(Side::query, Q);
    const int64_t passes = keeps_passes_ ? std::max<int64_t>(K, 1) : 1;
    for (int64_t k = 0; k < passes; ++k) supports_.push_back(make(of_support).moving(fixed_support_));
    query_ = make(of_query).moving(fixed_query_);
    if (plan_.moving_statistics) statistics_ = make(of_query).moving(fixed_support_);
    if (second_order_) tangent_ = make(of_tangent).tangent(fixed_support_);
    for (T*& scratch : scratch_) scratch = memory_.take(plan_.largest_collected() * std::max(S, Q));

    const int64_t size = plan_.moving_size;
    own_initial_ = std::ranges::any_of(request_.parameters, [](const auto& p) { return p.per_task; })
                       ? memory_.take(plan_.packed_size)
                       : nullptr;
    initial_ = own_initial_ ? own_initial_ : engine_.initial.data();
    for (int64_t k = 0; k < (keeps_thetas() ? K : std::min<int64_t>(K, 1)); ++k) thetas_.push_back(memory_.take(size));
    const int64_t gradients = engine_.learned_rates.empty() ? (request_.support_weight != 0 ? 2 : 1) : K;
    for (int64_t k = 0; k < std::max<int64_t>(gradients, 1); ++k) gradients_.push_back(memory_.take(size));
    if (backward_) v_ = memory_.take(size);
    if (backward_) sum_ = memory_.take(plan_.packed_size);
    if (second_order_) direction_ = memory_.take(size);
    for (const std::vector<T>& total : engine_.rate_totals) {
      rate_gradients_.push_back(total.empty() ? nullptr : memory_.take(static_cast<int64_t>(total.size())));
    }
  }

  // What support_pass(k) left in the one pass that there is memory for, which another has been through since.
  void repeat_support_pass(int64_t k) {
    Pass<T>& pass = support_pass_of(k);
    forward(Part::moving, theta_of(k), k, pass, nullptr);
    loss_.value(outputs(pass), support_samples_.targets(), pass.samples, T(1), gradient_of_output(pass));
    backward(Part::moving, theta_of(k), k, pass, nullptr, false, T(0), nullptr);
    latest_support_pass_ = k;
  }

  // v ← v + H_support(θ_k)·direction, after the support pass.
  void add_product_along_direction(int64_t k) {
    Pass<T>& pass = support_pass_of(k);
    forward_tangent(theta_of(k), k, pass);
    loss_.tangent(outputs(pass), tangent_.values[output_i()], pass.samples, tangent_.gradients[output_i()]);
    backward_tangent(theta_of(k), k, pass, v_);
  }

  // --- the start of a chunk, and of a task; its end -----------------------------------------------

  void start_chunk() {
    if (sum_) std::fill_n(sum_, plan_.packed_size, T(0));
    for (size_t p = 0; p < rate_gradients_.size(); ++p) {
      if (rate_gradients_[p]) std::fill_n(rate_gradients_[p], engine_.rate_totals[p].size(), T(0));
    }
  }

  void start_task() {
    task_loss_ = 0;
    if (own_initial_) {
      std::copy_n(engine_.initial.data(), plan_.packed_size, own_initial_);
      for (size_t p = 0; p < plan_.parameters.size(); ++p) {
        const PackedParameter& parameter = plan_.parameters[p];
        if (!request_.parameters[p].per_task || parameter.offset < 0) continue;
        pack(request_.parameters[p].data + task_ * parameter.size(), parameter, own_initial_);
      }
    }
    if (v_) std::fill_n(v_, plan_.moving_size, T(0));
    for (const std::unique_ptr<Layer<T>>& layer : layers_) layer->start_task();
    support_samples_.load(task_, at(fixed_support_.values, plan_.input));
    query_samples_.load(task_, at(fixed_query_.values, plan_.input));
    for (Pass<T>& pass : supports_) pass.samples = support_samples_.valid();
    fixed_support_.samples = statistics_.samples = support_samples_.valid();
    fixed_query_.samples = query_.samples = query_samples_.valid();
    for (const Side side : {Side::support, Side::query}) {
      Pass<T>& pass = fixed(side);
      if (pass.samples == 0) continue;
      for (const int value : plan_.boundary) {
        if (T* gradient = at(pass.gradients, value)) std::fill_n(gradient, dense_size(value, pass.samples), T(0));
      }
      forward(Part::fixed, initial_, 0, pass, side == Side::query ? &fixed_support_ : nullptr);
    }
    for (size_t s = 0; s < layers_.size(); ++s) {
      if (!layers_[s]->owns_weight()) continue;
      layers_[s]->prepare(initial_, primal(s, 0, fixed_support_, nullptr), primal(s, 0, fixed_query_, nullptr));
    }
  }

  // Adds v_0 to the chunk's sum, and writes the results that belong to this task alone.
  void finish_task() {
    if (request_.task_losses) request_.task_losses[task_] = static_cast<T>(task_loss_);
    if (backward_) add_scaled(v_, plan_.moving_size, T(1), sum_);
    for (size_t p = 0; p < request_.adapted.size(); ++p) {
      const PackedParameter& parameter = plan_.parameters[p];
      if (!request_.adapted[p]) continue;
      T* to = request_.adapted[p] + task_ * request_.program->parameter_size(static_cast<int>(p));
      unpack(theta_of(request_.steps), parameter, T(1), to);
    }
    for (size_t p = 0; p < request_.products.size(); ++p) {
      const PackedParameter& parameter = plan_.parameters[p];
      if (request_.products[p] == nullptr || parameter.offset < 0) continue;
      unpack(v_, parameter, T(1), request_.products[p] + task_ * parameter.size());
    }
    for (const int p : engine_.results) {
      if (!at(request_.parameters, p).per_task) continue;
      const PackedParameter& parameter = at(plan_.parameters, p);
      unpack(sum_, parameter, request_.gradient_scale, at(request_.gradients, p) + task_ * parameter.size());
    }
  }

  const T* value(const Pass<T>& pass, int value) const {
    if (value != plan_.input) return at(pass.values, value);
    return (pass.side == Side::support ? support_samples_ : query_samples_).input();
  }
  const T* outputs(const Pass<T>& pass) const { return value(pass, output_); }
  T* gradient_of_output(const Pass<T>& pass) const { return pass.gradients[output_i()]; }

  // --- through the layers ------------------------------------------------------------------------

  Primal<T> primal(size_t s, int64_t k, const Pass<T>& pass, const Pass<T>* partner) const {
    const Step& step = plan_.steps[s];
    Primal<T> p;
    p.side = pass.side;
    p.step = k;
    p.samples = pass.samples;
    for (size_t i = 0; i < step.inputs.size(); ++i) p.x[i] = value(pass, step.inputs[i]);
    p.y = at(pass.values, step.output);
    p.dy = at(pass.gradients, step.output);
    p.state = pass.states[s];
    p.partner = partner ? partner->states[s] : nullptr;
    return p;
  }

  void forward(Part part, const T* theta, int64_t k, Pass<T>& pass, const Pass<T>* partner) {
    for (size_t s = 0; s < plan_.steps.size(); ++s) {
      if (belongs(plan_.steps[s], part)) layers_[s]->forward(theta, primal(s, k, pass, partner));
    }
  }

  // Gradients of a part, from that of its last values, which are in place. whole: of all that is tracked, not only of
  // what moves; then what arrives at the boundary is added, times boundary_weight, to the fixed part's gradients.
  void backward(Part part, const T* theta, int64_t k, Pass<T>& pass, const Pass<T>* partner, bool whole,
                T boundary_weight, T* gradient) {
    arrived_.assign(plan_.values.size(), false);
    if (part == Part::moving) arrived_[output_i()] = true;
    if (part == Part::fixed) {
      for (const int value : plan_.boundary) at(arrived_, value) = true;
    }
    for (size_t s = plan_.steps.size(); s-- > 0;) {
      const Step& step = plan_.steps[s];
      if (!belongs(step, part) || !at(arrived_, step.output)) continue;
      Primal<T> p = primal(s, k, pass, partner);
      for (size_t i = 0; i < step.inputs.size(); ++i) {
        const int input = step.inputs[i];
        const bool wanted = whole ? at(plan_.has_tracked, input) : at(plan_.moves, input);
        if (wanted) p.dx[i] = destination(step, i, part, pass);
      }
      layers_[s]->backward(theta, p, (whole ? step.tracked : step.adapted) ? gradient : nullptr);
      for (size_t i = 0; i < step.inputs.size(); ++i) collect(step, i, part, p.dx[i], boundary_weight, pass);
    }
  }

  // Where a step's gradient for its input goes: to its place, if nothing has arrived there yet; else beside it.
  T* destination(const Step& step, size_t i, Part part, Pass<T>& pass) {
    const int input = step.inputs[i];
    const bool crosses = part == Part::moving && !at(plan_.moves, input);
    const bool twice = i == 1 && step.inputs[0] == input;
    return crosses || twice || at(arrived_, input) ? scratch_[i] : at(pass.gradients, input);
  }

  void collect(const Step& step, size_t i, Part part, const T* arriving, T boundary_weight, Pass<T>& pass) {
    if (!arriving) return;
    const int input = step.inputs[i];
    const int64_t size = dense_size(input, pass.samples);
    if (part == Part::moving && !at(plan_.moves, input)) {
      add_scaled(arriving, size, boundary_weight, at(fixed(pass.side).gradients, input));
    } else if (arriving == scratch_[i]) {
      add_scaled(arriving, size, T(1), at(pass.gradients, input));
    }
    at(arrived_, input) = true;
  }

  Tangent<T> tangent(size_t s) const {
    const Step& step = plan_.steps[s];
    Tangent<T> t;
    for (size_t i = 0; i < step.inputs.size(); ++i) t.x[i] = at(tangent_.values, step.inputs[i]);
    t.y = at(tangent_.values, step.output);
    t.dy = at(tangent_.gradients, step.output);
    t.state = tangent_.states[s];
    return t;
  }

  void forward_tangent(const T* theta, int64_t k, const Pass<T>& pass) {
    for (size_t s = 0; s < plan_.steps.size(); ++s) {
      const Step& step = plan_.steps[s];
      if (!step.moves) continue;
      layers_[s]->forward_tangent(theta, step.adapted ? direction_ : nullptr, primal(s, k, pass, nullptr), tangent(s));
    }
  }

  void backward_tangent(const T* theta, int64_t k, Pass<T>& pass, T* product) {
    arrived_.assign(plan_.values.size(), false);
    arrived_[output_i()] = true;
    for (size_t s = plan_.steps.size(); s-- > 0;) {
      const Step& step = plan_.steps[s];
      if (!step.moves || !at(arrived_, step.output)) continue;
      Tangent<T> t = tangent(s);
      for (size_t i = 0; i < step.inputs.size(); ++i) {
        if (at(plan_.has_tracked, step.inputs[i])) t.dx[i] = destination(step, i, Part::moving, tangent_);
      }
      layers_[s]->backward_tangent(theta, step.adapted ? direction_ : nullptr, primal(s, k, pass, nullptr), t,
                                   step.tracked ? product : nullptr);
      tangent_.samples = pass.samples;
      for (size_t i = 0; i < step.inputs.size(); ++i) collect(step, i, Part::moving, t.dx[i], T(1), tangent_);
    }
  }

  BlocksEngine<T>& engine_;
  const Request<T>& request_;
  const Plan& plan_;
  Arena arena_;
  Memory<T> memory_{arena_};
  ConvolutionScratch<T> scratch_of_convolutions_{memory_};
  std::vector<std::unique_ptr<Layer<T>>> layers_;  // by step
  std::vector<Layer<T>*> owners_;                  // those that stand for their weights themselves
  const int output_;
  const TaskLoss<T> loss_;
  TaskSamples<T> support_samples_, query_samples_;
  const bool backward_;  // gradients are wanted
  const bool second_order_;
  const bool keeps_passes_;  // every support pass has memory of its own, for the way back
  int64_t latest_support_pass_ = 0;

  Pass<T> fixed_support_, fixed_query_, query_, statistics_, tangent_;
  std::vector<Pass<T>> supports_;  // by k
  T* own_initial_ = nullptr;       // θ₀ where a parameter is per task
  const T* initial_ = nullptr;
  std::vector<T*> thetas_;     // θ₁ … θ_K, or the latest
  std::vector<T*> gradients_;  // g_k: see gradient_of_step
  T* v_ = nullptr;             // of what no layer stands for itself
  T* sum_ = nullptr;           // the sum of v_0 over the tasks of a chunk
  T* direction_ = nullptr;     // −α ⊙ v; 0 outside the adapted parameters
  std::vector<T*> rate_gradients_;
  T* scratch_[2] = {};
  std::vector<bool> arrived_;  // by value: its gradient has its first contribution
  int64_t task_ = 0;
  double task_loss_ = 0, support_loss_ = 0;
};

}  // namespace

template <class T>
std::unique_ptr<Worker> BlocksEngine<T>::make_worker() {
  return std::make_unique<BlocksWorker<T>>(*this);
}

template <class T>
std::unique_ptr<Engine<T>> make_blocks_engine(const Request<T>& request) {
  return std::make_unique<BlocksEngine<T>>(request);
}

template std::unique_ptr<Engine<float>> make_blocks_engine(const Request<float>&);
template std::unique_ptr<Engine<double>> make_blocks_engine(const Request<double>&);

}  // namespace innerloop::INNERLOOP_ISA
