// LayerNorm and GroupNorm: y = γ x̂ + β with x̂ = (x − m) r, m and var over a group of channels of one sample: the
// formulas of engine/sample_norm.cpp. A layer norm has one group, and γ, β of the sample's shape.
//
// A sample that a mask leaves out needs no care: dy is 0 there, and so is all that comes of it.
#include "cuda/engine/each.h"
#include "cuda/engine/layer.h"

namespace innerloop::gpu {
namespace {

// Where things lie. x is [sample of all tasks][pixel][channel], the state [sample of all tasks][group], and parameters
// are [task][parameter]: a channel's, or in torch's order of the sample's elements.
struct SampleShape {
  int64_t samples, pixels, channels, groups;
  bool has_element_parameters;

  __host__ __device__ int64_t group_channels() const { return channels / groups; }
  __host__ __device__ int64_t group_size() const { return pixels * group_channels(); }
  __host__ __device__ int64_t parameters() const { return has_element_parameters ? channels * pixels : channels; }

  // Of element i of x.
  __device__ int64_t group(int64_t i) const { return i / channels / pixels * groups + i % channels / group_channels(); }
  __device__ int64_t parameter(int64_t i) const {
    const int64_t task = i / channels / pixels / samples, c = i % channels;
    return task * parameters() + (has_element_parameters ? c * pixels + i / channels % pixels : c);
  }
  // The row-th element of a group of a sample.
  __device__ int64_t in_group(int64_t sample, int64_t row, int64_t group) const {
    return (sample * pixels + row / group_channels()) * channels + group * group_channels() + row % group_channels();
  }
  // The row-th element of a task that has a parameter.
  __device__ int64_t of_parameter(int64_t task, int64_t row, int64_t parameter) const {
    if (!has_element_parameters) return (task * samples * pixels + row) * channels + parameter;
    return ((task * samples + row) * pixels + parameter % pixels) * channels + parameter / pixels;
  }
};

// What the kernels read. Null: γ = 1, β = 0; along the direction: 0.
template <class T>
struct SampleInput {
  SampleShape shape;
  const T* x;
  const T* mean;
  const T* rstd;
  const T* gamma;
  const T* beta;
  const T* dy;
  const T* x_tangent;
  const T* mean_tangent;  // ⟨ẋ⟩
  const T* s;             // ⟨x̂ ẋ⟩
  const T* gamma_tangent;
  const T* beta_tangent;
  const T* dy_tangent;

  __device__ T scale(int64_t i) const { return gamma ? gamma[shape.parameter(i)] : T(1); }
  __device__ T normalised(int64_t i) const { return (x[i] - mean[shape.group(i)]) * rstd[shape.group(i)]; }
  __device__ T normalised_tangent(int64_t i) const {  // x̂′ = r (ẋ − ⟨ẋ⟩ − s x̂)
    const int64_t g = shape.group(i);
    return x_tangent ? rstd[g] * (x_tangent[i] - mean_tangent[g] - s[g] * normalised(i)) : T(0);
  }
  __device__ T q(int64_t i) const { return scale(i) * dy[i]; }
  __device__ T q_tangent(int64_t i) const {  // γ̇ dy + γ dẏ
    const T moved = gamma_tangent ? gamma_tangent[shape.parameter(i)] * dy[i] : T(0);
    return moved + scale(i) * dy_tangent[i];
  }
};

// --- sums over a group ----------------------------------------------------------------------------

// Calls terms of a group's elements: Of is a struct of a Pair of(input, element).
template <class T, class Of>
struct GroupTerms {
  SampleInput<T> in;
  __device__ Pair<T> operator()(int64_t sample, int64_t row, int64_t group) const {
    return Of::of(in, in.shape.in_group(sample, row, group));
  }
};

template <class T>
struct StoreGroupMeans {  // null: not wanted
  int64_t groups, size;
  T* first;
  T* second;
  __device__ void operator()(int64_t sample, int64_t group, const Pair<double>& sum) const {
    first[sample * groups + group] = static_cast<T>(sum.first / static_cast<double>(size));
    if (second) second[sample * groups + group] = static_cast<T>(sum.second / static_cast<double>(size));
  }
};

template <class T>
struct StoreGroupRstd {
  int64_t groups, size;
  T eps;
  T* rstd;
  __device__ void operator()(int64_t sample, int64_t group, const Pair<double>& sum) const {
    rstd[sample * groups + group] = 1 / sqrt(static_cast<T>(sum.first / static_cast<double>(size)) + eps);
  }
};

struct Values {
  template <class T>
  static __device__ Pair<T> of(const SampleInput<T>& in, int64_t i) {
    return {in.x[i], T(0)};
  }
};

struct Squares {  // of differences to the mean
  template <class T>
  static __device__ Pair<T> of(const SampleInput<T>& in, int64_t i) {
    const T difference = in.x[i] - in.mean[in.shape.group(i)];
    return {difference * difference, T(0)};
  }
};

struct Gradients {  // of B and G
  template <class T>
  static __device__ Pair<T> of(const SampleInput<T>& in, int64_t i) {
    return {in.q(i), in.q(i) * in.normalised(i)};
  }
};

struct Tangents {  // of ⟨ẋ⟩ and s
  template <class T>
  static __device__ Pair<T> of(const SampleInput<T>& in, int64_t i) {
    return {in.x_tangent[i], in.x_tangent[i] * in.normalised(i)};
  }
};

struct GradientTangents {  // of ⟨q̇⟩ and ⟨q̇ x̂ + q x̂′⟩
  template <class T>
  static __device__ Pair<T> of(const SampleInput<T>& in, int64_t i) {
    return {in.q_tangent(i), in.q_tangent(i) * in.normalised(i) + in.q(i) * in.normalised_tangent(i)};
  }
};

// --- sums over what shares a parameter ------------------------------------------------------------

template <class T>
struct ParameterTerms {  // of dβ and dγ
  SampleInput<T> in;
  __device__ Pair<T> operator()(int64_t task, int64_t row, int64_t parameter) const {
    const int64_t i = in.shape.of_parameter(task, row, parameter);
    return {in.dy[i], in.dy[i] * in.normalised(i)};
  }
};

template <class T>
struct ParameterTangentTerms {  // dẏ and dẏ x̂ + dy x̂′
  SampleInput<T> in;
  __device__ Pair<T> operator()(int64_t task, int64_t row, int64_t parameter) const {
    const int64_t i = in.shape.of_parameter(task, row, parameter);
    return {in.dy_tangent[i], in.dy_tangent[i] * in.normalised(i) + in.dy[i] * in.normalised_tangent(i)};
  }
};

template <class T>
struct AddParameterSums {  // null: not wanted
  int64_t parameters;
  T* beta;
  T* gamma;
  __device__ void operator()(int64_t task, int64_t parameter, const Pair<double>& sum) const {
    if (beta) beta[task * parameters + parameter] += static_cast<T>(sum.first);
    if (gamma) gamma[task * parameters + parameter] += static_cast<T>(sum.second);
  }
};

// --- element by element ---------------------------------------------------------------------------

template <class T>
struct Output {
  SampleInput<T> in;
  T* y;
  __device__ void operator()(int64_t i) const {
    y[i] = in.scale(i) * in.normalised(i) + (in.beta ? in.beta[in.shape.parameter(i)] : T(0));
  }
};

template <class T>
struct OutputTangent {  // ẏ = γ̇ x̂ + γ x̂′ + β̇
  SampleInput<T> in;
  T* y;
  __device__ void operator()(int64_t i) const {
    T value = in.scale(i) * in.normalised_tangent(i);
    if (in.gamma_tangent) value += in.gamma_tangent[in.shape.parameter(i)] * in.normalised(i);
    if (in.beta_tangent) value += in.beta_tangent[in.shape.parameter(i)];
    y[i] = value;
  }
};

template <class T>
struct InputGradient {  // r (q − B − x̂ G)
  SampleInput<T> in;
  const T* B;
  const T* G;
  T* dx;
  __device__ void operator()(int64_t i) const {
    const int64_t g = in.shape.group(i);
    dx[i] = in.rstd[g] * (in.q(i) - B[g] - in.normalised(i) * G[g]);
  }
};

template <class T>
struct InputGradientTangent {  // −r² s (q − B − x̂ G) + r (q̇ − ⟨q̇⟩ − x̂′ G − x̂ ⟨q̇ x̂ + q x̂′⟩)
  SampleInput<T> in;
  const T* B;
  const T* G;
  const T* B_tangent;
  const T* G_tangent;
  T* dx;
  __device__ void operator()(int64_t i) const {
    const int64_t g = in.shape.group(i);
    const T x_hat = in.normalised(i), r = in.rstd[g];
    const T changed = in.q_tangent(i) - B_tangent[g] - in.normalised_tangent(i) * G[g] - x_hat * G_tangent[g];
    const T turned = in.x_tangent ? r * in.s[g] * (in.q(i) - B[g] - x_hat * G[g]) : T(0);
    dx[i] = r * (changed - turned);
  }
};

template <class T>
class SampleNorm final : public Layer<T> {
 public:
  SampleNorm(const Node& node, const LayerContext<T>& context)
      : device_(context.device),
        scratch_(context.scratch),
        eps_(static_cast<T>(node.number)),
        x_(context.value(node.inputs[0])),
        groups_(node.kind == Kind::layer_norm ? 1 : node.groups),
        has_element_parameters_(node.kind == Kind::layer_norm),
        weight_(node.weight),
        bias_(node.bias) {}

  int64_t state_size(int64_t samples) const override { return 4 * samples * groups_; }          // m, r, B, G
  int64_t tangent_state_size(int64_t samples) const override { return 4 * samples * groups_; }  // ⟨ẋ⟩, s, and of B, G
  ScratchSize scratch_size(int64_t samples) const override {
    const SampleShape at = shape(samples);
    return {0, 0,
            std::max(samples * sums_size(at.group_size(), groups_), sums_size(rows_of_parameter(at), at.parameters()))};
  }

  void forward(const Parameters<T>& theta, const Primal<T>& p) override {
    const SampleInput<T> in = input(theta, p);
    T *mean = piece(p, p.state, 0), *rstd = piece(p, p.state, 1);
    sum_groups<Values>(p, in, StoreGroupMeans<T>{groups_, in.shape.group_size(), mean, nullptr});
    sum_groups<Squares>(p, in, StoreGroupRstd<T>{groups_, in.shape.group_size(), eps_, rstd});
    each(device_, count(p), Output<T>{in, p.y});
  }

  void backward(const Parameters<T>& theta, const Primal<T>& p, const Parameters<T>& gradient) override {
    const SampleInput<T> in = input(theta, p);
    T *B = piece(p, p.state, 2), *G = piece(p, p.state, 3);
    sum_groups<Gradients>(p, in, StoreGroupMeans<T>{groups_, in.shape.group_size(), B, G});
    add_parameters(p, in.shape, ParameterTerms<T>{in}, gradient);
    if (p.dx[0]) each(device_, count(p), InputGradient<T>{in, B, G, p.dx[0]});
  }

  void forward_tangent(const Parameters<T>& theta, const Parameters<T>& direction, const Primal<T>& p,
                       const Tangent<T>& t) override {
    const SampleInput<T> in = input(theta, p, &direction, &t);
    if (t.x[0]) {
      T *mean = piece(p, t.state, 0), *s = piece(p, t.state, 1);
      sum_groups<Tangents>(p, in, StoreGroupMeans<T>{groups_, in.shape.group_size(), mean, s});
    }
    each(device_, count(p), OutputTangent<T>{in, t.y});
  }

  void backward_tangent(const Parameters<T>& theta, const Parameters<T>& direction, const Primal<T>& p,
                        const Tangent<T>& t, const Parameters<T>& product) override {
    const SampleInput<T> in = input(theta, p, &direction, &t);
    add_parameters(p, in.shape, ParameterTangentTerms<T>{in}, product);
    if (!t.dx[0]) return;
    T *B = piece(p, p.state, 2), *G = piece(p, p.state, 3);
    T *B_tangent = piece(p, t.state, 2), *G_tangent = piece(p, t.state, 3);
    sum_groups<GradientTangents>(p, in, StoreGroupMeans<T>{groups_, in.shape.group_size(), B_tangent, G_tangent});
    each(device_, count(p), InputGradientTangent<T>{in, B, G, B_tangent, G_tangent, t.dx[0]});
  }

 private:
  SampleShape shape(int64_t samples) const {
    return {samples, x_.height * x_.width, x_.channels, groups_, has_element_parameters_};
  }
  static int64_t rows_of_parameter(const SampleShape& at) {
    return at.has_element_parameters ? at.samples : at.samples * at.pixels;
  }
  int64_t count(const Primal<T>& p) const { return p.tasks * p.samples * x_.size(); }
  // Piece `index` of a state: see state_size.
  T* piece(const Primal<T>& p, T* state, int index) const { return state + index * p.tasks * p.samples * groups_; }

  SampleInput<T> input(const Parameters<T>& theta, const Primal<T>& p, const Parameters<T>* direction = nullptr,
                       const Tangent<T>* t = nullptr) const {
    SampleInput<T> in{};
    in.shape = shape(p.samples);
    in.x = p.x[0];
    in.mean = piece(p, p.state, 0);
    in.rstd = piece(p, p.state, 1);
    in.gamma = at(theta, weight_);
    in.beta = at(theta, bias_);
    in.dy = p.dy;
    if (t == nullptr) return in;
    in.x_tangent = t->x[0];
    in.mean_tangent = piece(p, t->state, 0);
    in.s = piece(p, t->state, 1);
    in.gamma_tangent = at(*direction, weight_);
    in.beta_tangent = at(*direction, bias_);
    in.dy_tangent = t->dy;
    return in;
  }

  template <class Of, class Finish>
  void sum_groups(const Primal<T>& p, const SampleInput<T>& in, const Finish& finish) const {
    sum_rows(device_, p.tasks * p.samples, in.shape.group_size(), groups_, scratch_.sums, GroupTerms<T, Of>{in},
             finish);
  }

  template <class Terms>
  void add_parameters(const Primal<T>& p, const SampleShape& shape, const Terms& terms,
                      const Parameters<T>& gradient) const {
    T *beta = at(gradient, bias_), *gamma = at(gradient, weight_);
    if (!beta && !gamma) return;
    sum_rows(device_, p.tasks, rows_of_parameter(shape), shape.parameters(), scratch_.sums, terms,
             AddParameterSums<T>{shape.parameters(), beta, gamma});
  }

  const Device& device_;
  const Scratch<T>& scratch_;
  const T eps_;
  const Shape x_;
  const int64_t groups_;
  const bool has_element_parameters_;
  const int weight_, bias_;
};

}  // namespace

template <class T>
std::unique_ptr<Layer<T>> make_sample_norm(const Node& node, const LayerContext<T>& context) {
  return std::make_unique<SampleNorm<T>>(node, context);
}

template std::unique_ptr<Layer<float>> make_sample_norm(const Node&, const LayerContext<float>&);
template std::unique_ptr<Layer<double>> make_sample_norm(const Node&, const LayerContext<double>&);

}  // namespace innerloop::gpu
