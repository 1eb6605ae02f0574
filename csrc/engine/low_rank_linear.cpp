// Every gradient of the weight of y = x·W + b is xᵀ·dy: with x the same at each step, all that the inner loop and the
// way back do to W stays in the span of the samples. So it is enough to keep what stands before xᵀ. Let X hold the
// support and then the query samples of a task, D_k the dy of support pass k, and [·]ₛ the support rows:
//
//     W_k = W_0 − Xₛᵀ·E_k,     E_0 = 0,  E_{k+1} = E_k + α_k D_k
//     X·W_k = X·W_0 − G·E_k,   G = X·Xₛᵀ
//     v = Xᵀ·U:  a query pass adds its dy to the query rows of U, u∇L_support(θ₀) adds u·D_0 to the support rows,
//     the tangent along −α_k v is  ẏ = −α_k Xₛ·v = −α_k Gᵀ·U,  and −H·(α_k v) adds its dẏ to the support rows;
//     dL/dα_k = −⟨v, Xₛᵀ·D_k⟩ = −⟨Gᵀ·U, D_k⟩
//
// What remains of the size of W are two products for each task, X·W_0 and at the end Xᵀ·U. The bias is small and goes
// the plain way.
#include "engine/low_rank_linear.h"

#include <algorithm>
#include <array>

#include "kernels/gemm.h"

namespace innerloop::INNERLOOP_ISA {
namespace {

template <class T>
class LowRankLinear final : public Layer<T> {
 public:
  LowRankLinear(const Node& node, const LayerContext<T>& context)
      : rate_(context.request.rates[static_cast<size_t>(node.weight)]),
        inputs_(context.value(node.inputs[0]).shape.channels),
        outputs_(context.value(node.output).shape.channels),
        x_row_(context.value(node.inputs[0]).stride),
        y_row_(context.value(node.output).stride),
        weight_(context.offset(node.weight)),
        bias_(context.offset(node.bias)),
        max_support_(context.request.support.count),
        keeps_steps_(context.request.wants_gradients()) {
    const int64_t rows = max_support_ + context.request.query.count;
    const int64_t steps = keeps_steps_ ? context.request.steps : std::min<int64_t>(context.request.steps, 1);
    start_ = context.memory.take(rows * y_row_);
    gram_ = context.memory.take(rows * max_support_);
    changes_ = context.memory.take((steps + 1) * max_support_ * y_row_);
    gradients_ = context.memory.take(std::max<int64_t>(steps, 1) * max_support_ * y_row_);
    directions_ = context.memory.take(rows * y_row_);
    along_v_ = context.memory.take(max_support_ * y_row_);
  }

  bool owns_weight() const override { return true; }

  void prepare(const T* theta, const Primal<T>& support, const Primal<T>& query) override {
    support_ = support.samples;
    rows_ = support.samples + query.samples;
    sides_ = {Rows{support.x[0], 0, support.samples}, Rows{query.x[0], support.samples, query.samples}};
    for (const Rows& side : sides_) {
      multiply<T>({.rows = side.count,
                   .inner = inputs_,
                   .columns = y_row_,
                   .a_row = x_row_,
                   .b_row = y_row_,
                   .out_row = y_row_},
                  {{side.x, theta + weight_}}, nullptr, start_ + side.first * y_row_);
      multiply_rows<T>(side.count, support_, inputs_, side.x, x_row_, support.x[0], x_row_, T(0),
                       gram_ + side.first * support_, support_);
    }
    for (int64_t i = 0; i < rows_ * support_; ++i) gram_[i] = -gram_[i];
    std::fill_n(changes_, support_ * y_row_, T(0));
    std::fill_n(directions_, rows_ * y_row_, T(0));
  }

  // y = X·W_0 − G·E_k + b_k
  void forward(const T* theta, const Primal<T>& p) override {
    const int64_t first = p.side == Side::support ? 0 : support_;
    const T* start = start_ + first * y_row_;
    for (int64_t n = 0; n < p.samples; ++n) {
      for (int64_t o = 0; o < y_row_; ++o) {
        p.y[n * y_row_ + o] = start[n * y_row_ + o] + (bias_ < 0 ? T(0) : theta[bias_ + o]);
      }
    }
    if (p.step == 0) return;
    multiply_add<T>({.rows = p.samples,
                     .inner = support_,
                     .columns = y_row_,
                     .a_row = support_,
                     .b_row = y_row_,
                     .out_row = y_row_},
                    {{gram_ + first * support_, change(p.step)}}, p.y);
  }

  // A support pass's gradient is that of its step; a query pass's goes to v.
  void backward(const T*, const Primal<T>& p, T* gradient) override {
    if (p.side == Side::support) {
      std::copy_n(p.dy, support_ * y_row_, gradient_of(p.step));
    } else {
      add(p.dy, p.samples, T(1), directions_ + support_ * y_row_);
    }
    add_bias_gradient(p.samples, p.dy, gradient);
  }

  void forward_tangent(const T*, const T* direction, const Primal<T>& p, const Tangent<T>& t) override {
    const T rate = rate_at(p.step);
    const T* negative = minus_x_times_v();
    for (int64_t n = 0; n < p.samples; ++n) {
      for (int64_t o = 0; o < y_row_; ++o) {
        t.y[n * y_row_ + o] = rate * negative[n * y_row_ + o] + (bias_ < 0 ? T(0) : direction[bias_ + o]);
      }
    }
  }

  void backward_tangent(const T*, const T*, const Primal<T>& p, const Tangent<T>& t, T* product) override {
    add(t.dy, p.samples, T(1), directions_);
    add_bias_gradient(p.samples, t.dy, product);
  }

  void descend(int64_t k) override {
    const T *from = change(k), *gradient = gradient_of(k);
    T* to = change(k + 1);
    for (int64_t i = 0; i < support_ * y_row_; ++i) to[i] = from[i] + rate_at(k) * gradient[i];
  }

  T rate_gradient(int64_t k) override {
    const T *negative = minus_x_times_v(), *gradient = gradient_of(k);
    double sum = 0;
    for (int64_t n = 0; n < support_; ++n) {
      for (int64_t o = 0; o < outputs_; ++o) {
        sum += static_cast<double>(negative[n * y_row_ + o] * gradient[n * y_row_ + o]);
      }
    }
    return static_cast<T>(sum);
  }

  void add_support_gradient(T u) override { add(gradient_of(0), support_, u, directions_); }

  void finish_task(T* sum) override {
    for (const Rows& side : sides_) {
      add_outer<T>({.points = side.count,
                    .rows = inputs_,
                    .columns = y_row_,
                    .a_row = x_row_,
                    .b_row = y_row_,
                    .out_row = y_row_},
                   side.x, directions_ + side.first * y_row_, sum + weight_);
    }
  }

 private:
  // One side's rows of X, of which the first has this number.
  struct Rows {
    const T* x = nullptr;
    int64_t first = 0, count = 0;
  };

  T rate_at(int64_t k) const { return rate_.data[rate_.per_step ? k : 0]; }
  T* change(int64_t k) const { return changes_ + (keeps_steps_ ? k : 0) * max_support_ * y_row_; }
  T* gradient_of(int64_t k) const { return gradients_ + (keeps_steps_ ? k : 0) * max_support_ * y_row_; }

  void add(const T* from, int64_t rows, T scale, T* to) const {
    for (int64_t i = 0; i < rows * y_row_; ++i) to[i] += scale * from[i];
  }

  void add_bias_gradient(int64_t rows, const T* dy, T* gradient) const {
    if (bias_ >= 0 && gradient) add_column_sums(rows, y_row_, dy, y_row_, gradient + bias_);
  }

  // −Xₛ·v
  const T* minus_x_times_v() const {
    multiply<T>({.rows = support_,
                 .inner = rows_,
                 .columns = y_row_,
                 .a_row = 1,
                 .a_inner = support_,
                 .b_row = y_row_,
                 .out_row = y_row_},
                {{gram_, directions_}}, nullptr, along_v_);
    return along_v_;
  }

  const RateArgument<T> rate_;
  const int64_t inputs_, outputs_, x_row_, y_row_, weight_, bias_, max_support_;
  const bool keeps_steps_;

  int64_t support_ = 0, rows_ = 0;  // samples of the task
  std::array<Rows, 2> sides_;       // X
  T* start_;                        // X·W_0
  T* gram_;                         // −G [rows][support]
  T* changes_;                      // E_k by k, or the latest
  T* gradients_;                    // D_k by k, or the latest
  T* directions_;                   // U
  T* along_v_;
};

}  // namespace

template <class T>
bool low_rank_applies(const Node& node, const Request<T>& request) {
  const RateArgument<T>& rate = request.rates[static_cast<size_t>(node.weight)];
  // Where θ_K is a result the weight has to be formed anyway; a direction from outside is not in the samples' span.
  const bool in_span = request.adapted.empty() && !request.wants_products();
  return node.kind == Kind::linear && rate.data != nullptr && !rate.per_element && in_span;
}

template <class T>
bool low_rank_pays(const Node& node, const Request<T>& request) {
  const std::vector<int64_t>& shape = request.program->parameters[static_cast<size_t>(node.weight)];
  const double outputs = static_cast<double>(shape[0]), inputs = static_cast<double>(shape[1]);
  const double support = static_cast<double>(request.support.count), query = static_cast<double>(request.query.count);
  const double steps = static_cast<double>(request.steps);
  // Products of the size of W with the support set that are saved: of K steps forward, backward and twice in the
  // tangents, less X·W_0 and Xᵀ·U.
  const double saved = !request.wants_gradients() ? 2 * steps - 1 : request.first_order ? 2 * steps - 2 : 4 * steps - 2;
  return saved * inputs * outputs > (support + query) * inputs + 2 * (steps * support + query) * outputs;
}

template <class T>
std::unique_ptr<Layer<T>> make_low_rank_linear(const Node& node, const LayerContext<T>& context) {
  return std::make_unique<LowRankLinear<T>>(node, context);
}

template bool low_rank_applies(const Node&, const Request<float>&);
template bool low_rank_applies(const Node&, const Request<double>&);
template bool low_rank_pays(const Node&, const Request<float>&);
template bool low_rank_pays(const Node&, const Request<double>&);
template std::unique_ptr<Layer<float>> make_low_rank_linear(const Node&, const LayerContext<float>&);
template std::unique_ptr<Layer<double>> make_low_rank_linear(const Node&, const LayerContext<double>&);

}  // namespace innerloop::INNERLOOP_ISA
