// y = γ x̂ + β with x̂ = (x − m) r, channel by channel: the formulas of engine/batch_norm.cpp, with the ReLU and the max
// pool behind it in the same kernels where there are any. A pool's windows must lie side by side; without a pool they
// are single pixels.
//
// Behind ReLU and pool one pixel of a window is chosen, or none where the largest is not above 0: everything that
// passes between x and y passes at that pixel. So the sums over dy run over windows, and dx is dy at the chosen pixel.
#include "cuda/engine/each.h"
#include "cuda/engine/layer.h"

namespace innerloop::gpu {
namespace {

struct NormPlace {  // of an element of x or of y
  int64_t task, row, c;
  int64_t tc;  // of its task's channel in the state
};

// x is [tasks][samples][height][width][channels]; y has a pixel for every window; m, r and the rest of the state are
// [tasks][channels].
struct NormShape {
  int64_t samples, height, width, channels;
  int64_t window_height, window_width, y_height, y_width;

  __host__ __device__ int64_t x_rows() const { return samples * height * width; }
  __host__ __device__ int64_t y_rows() const { return samples * y_height * y_width; }

  // Of element i of x or of y, of which a task has so many rows.
  __device__ NormPlace place(int64_t i, int64_t rows) const {
    const int64_t c = i % channels, task = i / channels / rows;
    return {task, i / channels % rows, c, task * channels + c};
  }

  // The element of x at a position of the window of pixel `row` of y.
  __device__ int64_t in_window(int64_t task, int64_t row, int64_t c, int64_t position) const {
    const int64_t w = row % y_width * window_width + position % window_width;
    const int64_t h = row / y_width % y_height * window_height + position / window_width;
    const int64_t n = task * samples + row / y_width / y_height;
    return ((n * height + h) * width + w) * channels + c;
  }
};

// What the kernels read. Null: γ = 1, β = 0; every pixel is chosen; every sample is valid.
template <class T>
struct NormInput {
  NormShape shape;
  const T* x;
  const T* mean;
  const T* rstd;
  const T* gamma;
  const T* beta;
  const T* chosen;  // [tasks][y rows][channels]: the position in the window, -1: none
  const bool* mask;

  __device__ T scale(int64_t tc) const { return gamma ? gamma[tc] : T(1); }
  __device__ T normalised(int64_t i, int64_t tc) const { return (x[i] - mean[tc]) * rstd[tc]; }
  // The element of x that element i of y comes from; -1: none.
  __device__ int64_t source(int64_t task, int64_t row, int64_t c, int64_t i) const {
    if (chosen == nullptr) return shape.in_window(task, row, c, 0);
    const auto position = static_cast<int64_t>(chosen[i]);
    return position < 0 ? -1 : shape.in_window(task, row, c, position);
  }
  // The element of y that element i of x was chosen for; -1: none.
  __device__ int64_t destination(int64_t task, int64_t row, int64_t c) const {
    const int64_t w = row % shape.width, h = row / shape.width % shape.height, n = row / shape.width / shape.height;
    const int64_t y_w = w / shape.window_width, y_h = h / shape.window_height;
    if (y_w >= shape.y_width || y_h >= shape.y_height) return -1;
    const int64_t y_row = (n * shape.y_height + y_h) * shape.y_width + y_w;
    const int64_t i = (task * shape.y_rows() + y_row) * shape.channels + c;
    if (chosen == nullptr) return i;
    const int64_t position = h % shape.window_height * shape.window_width + w % shape.window_width;
    return chosen[i] == static_cast<T>(position) ? i : -1;
  }
  __device__ bool is_valid(int64_t task, int64_t row) const {
    return mask == nullptr || mask[task * shape.samples + row / shape.width / shape.height];
  }
};

// --- statistics -----------------------------------------------------------------------------------

template <class T>
struct ValueTerms {  // of m
  NormInput<T> in;
  __device__ Pair<T> operator()(int64_t task, int64_t row, int64_t c) const {
    if (!in.is_valid(task, row)) return {};
    return {in.x[(task * in.shape.x_rows() + row) * in.shape.channels + c], T(0)};
  }
};

template <class T>
struct SquareTerms {  // of var, from differences to the mean
  NormInput<T> in;
  __device__ Pair<T> operator()(int64_t task, int64_t row, int64_t c) const {
    if (!in.is_valid(task, row)) return {};
    const int64_t tc = task * in.shape.channels + c;
    const T difference = in.x[(task * in.shape.x_rows() + row) * in.shape.channels + c] - in.mean[tc];
    return {difference * difference, T(0)};
  }
};

// Where the sums of a task divided by its number of valid pixels go. Null: nowhere.
template <class T>
struct StoreMeans {
  const T* valid;
  int64_t pixels, channels;
  T* first;
  T* second;
  __device__ T count(int64_t task) const { return valid[task] * static_cast<T>(pixels); }
  __device__ void operator()(int64_t task, int64_t c, const Pair<double>& sum) const {
    first[task * channels + c] = static_cast<T>(sum.first) / count(task);
    if (second) second[task * channels + c] = static_cast<T>(sum.second) / count(task);
  }
};

template <class T>
struct StoreRstd {
  const T* valid;
  int64_t pixels, channels;
  T eps;
  T* rstd;
  __device__ void operator()(int64_t task, int64_t c, const Pair<double>& sum) const {
    const T var = static_cast<T>(sum.first) / (valid[task] * static_cast<T>(pixels));
    rstd[task * channels + c] = 1 / sqrt(var + eps);
  }
};

template <class T>
struct RunningStatistics {
  const T* running_mean;
  const T* running_var;
  T eps;
  int64_t channels;
  T* mean;
  T* rstd;
  __device__ void operator()(int64_t tc) const {
    mean[tc] = running_mean[tc % channels];
    rstd[tc] = 1 / sqrt(running_var[tc % channels] + eps);
  }
};

template <class T>
struct Copy {
  const T* from;
  T* to;
  __device__ void operator()(int64_t i) const { to[i] = from[i]; }
};

// --- forward --------------------------------------------------------------------------------------

template <class T>
struct Normalise {
  NormInput<T> in;  // without what is chosen: that is found here
  bool relu;
  T* y;
  T* chosen;  // null: not wanted
  __device__ void operator()(int64_t i) const {
    const auto [task, row, c, tc] = in.shape.place(i, in.shape.y_rows());
    const T gamma = in.scale(tc), beta = in.beta ? in.beta[tc] : T(0);
    T largest = 0;
    int64_t found = -1;
    for (int64_t position = 0; position < in.shape.window_height * in.shape.window_width; ++position) {
      T z = in.normalised(in.shape.in_window(task, row, c, position), tc) * gamma + beta;
      if (relu && z <= 0) z = 0;  // NaN stays NaN, as in torch
      if (found >= 0 && !(z > largest) && z == z) continue;
      largest = z;
      found = position;
    }
    y[i] = largest;
    if (chosen) chosen[i] = static_cast<T>(relu && !(largest > 0) ? -1 : found);
  }
};

// --- backward -------------------------------------------------------------------------------------

template <class T>
struct GradientTerms {  // of dβ and dγ: dy and dy x̂ at the chosen pixels
  NormInput<T> in;
  const T* dy;
  __device__ Pair<T> operator()(int64_t task, int64_t row, int64_t c) const {
    const int64_t i = (task * in.shape.y_rows() + row) * in.shape.channels + c;
    const int64_t x = in.source(task, row, c, i);
    if (x < 0) return {};
    return {dy[i], dy[i] * in.normalised(x, task * in.shape.channels + c)};
  }
};

// Where the sums Σdy and Σdy x̂ go: dβ and dγ, B and G, and under bn = support the gradients of the statistics that the
// query pass read, ∂L/∂m = −γ r Σdy and ∂L/∂var = −γ r² Σ(dy x̂)/2. Null: nowhere.
template <class T>
struct StoreGradients {
  NormInput<T> in;
  const T* valid;
  int64_t pixels;
  T* beta_gradient;
  T* gamma_gradient;
  T* B;
  T* G;
  T* for_mean;
  T* for_var;
  __device__ void operator()(int64_t task, int64_t c, const Pair<double>& sum) const {
    const int64_t tc = task * in.shape.channels + c;
    const T first = static_cast<T>(sum.first), second = static_cast<T>(sum.second);
    if (beta_gradient) beta_gradient[tc] += first;
    if (gamma_gradient) gamma_gradient[tc] += second;
    if (B) {
      const T n = valid[task] * static_cast<T>(pixels);
      B[tc] = first / n;
      G[tc] = second / n;
    }
    if (for_mean) {
      for_mean[tc] -= in.scale(tc) * in.rstd[tc] * first;
      for_var[tc] -= in.scale(tc) * in.rstd[tc] * in.rstd[tc] * second / 2;
    }
  }
};

// dx = γ r (dy − B − x̂ G), and under bn = support what queries have left for the statistics.
template <class T>
struct InputGradient {
  NormInput<T> in;
  const T* dy;
  const T* B;
  const T* G;
  const T* for_mean;  // null: there is nothing
  const T* for_var;
  const T* valid;
  int64_t pixels;
  T* dx;
  __device__ void operator()(int64_t i) const {
    const auto [task, row, c, tc] = in.shape.place(i, in.shape.x_rows());
    if (!in.is_valid(task, row)) {
      dx[i] = 0;
      return;
    }
    const int64_t y = in.destination(task, row, c);
    T value = in.scale(tc) * in.rstd[tc] * ((y < 0 ? T(0) : dy[y]) - B[tc] - in.normalised(i, tc) * G[tc]);
    if (for_mean) {
      value += (for_mean[tc] + 2 * for_var[tc] * (in.x[i] - in.mean[tc])) / (valid[task] * static_cast<T>(pixels));
    }
    dx[i] = value;
  }
};

// --- tangents -------------------------------------------------------------------------------------

// The direction, and what becomes of x̂ along it: x̂′ = r (ẋ − ṁ − s x̂). Null: 0.
template <class T>
struct NormDirection {
  const T* x;
  const T* mean;
  const T* s;
  const T* gamma;
  const T* beta;
  __device__ T normalised(const NormInput<T>& in, int64_t i, int64_t tc) const {
    return x ? in.rstd[tc] * (x[i] - mean[tc] - s[tc] * in.normalised(i, tc)) : T(0);
  }
};

template <class T>
struct TangentTerms {  // of ṁ and s: ẋ and ẋ x̂
  NormInput<T> in;
  const T* x_tangent;
  __device__ Pair<T> operator()(int64_t task, int64_t row, int64_t c) const {
    if (!in.is_valid(task, row)) return {};
    const int64_t i = (task * in.shape.x_rows() + row) * in.shape.channels + c;
    return {x_tangent[i], x_tangent[i] * in.normalised(i, task * in.shape.channels + c)};
  }
};

template <class T>
struct OutputTangent {  // ẏ = γ̇ x̂ + γ x̂′ + β̇
  NormInput<T> in;
  NormDirection<T> along;
  T* y;
  __device__ void operator()(int64_t i) const {
    const auto [task, row, c, tc] = in.shape.place(i, in.shape.y_rows());
    const int64_t x = in.source(task, row, c, i);
    T value = 0;
    if (x >= 0) {
      value = in.scale(tc) * along.normalised(in, x, tc);
      if (along.gamma) value += along.gamma[tc] * in.normalised(x, tc);
      if (along.beta) value += along.beta[tc];
    }
    y[i] = value;
  }
};

template <class T>
struct GradientTangentTerms {  // of Ḃ and Ġ: dẏ and dẏ x̂ + dy x̂′
  NormInput<T> in;
  NormDirection<T> along;
  const T* dy;
  const T* dy_tangent;
  __device__ Pair<T> operator()(int64_t task, int64_t row, int64_t c) const {
    const int64_t i = (task * in.shape.y_rows() + row) * in.shape.channels + c;
    const int64_t x = in.source(task, row, c, i), tc = task * in.shape.channels + c;
    if (x < 0) return {};
    return {dy_tangent[i], dy_tangent[i] * in.normalised(x, tc) + dy[i] * along.normalised(in, x, tc)};
  }
};

// dẋ = (γ̇ r − γ r² s) A + γ r Ȧ with A = dy − B − x̂ G and Ȧ = dẏ − Ḃ − x̂′ G − x̂ Ġ
template <class T>
struct InputGradientTangent {
  NormInput<T> in;
  NormDirection<T> along;
  const T* dy;
  const T* dy_tangent;
  const T* B;
  const T* G;
  const T* B_tangent;
  const T* G_tangent;
  T* dx;
  __device__ void operator()(int64_t i) const {
    const auto [task, row, c, tc] = in.shape.place(i, in.shape.x_rows());
    if (!in.is_valid(task, row)) {
      dx[i] = 0;
      return;
    }
    const int64_t y = in.destination(task, row, c);
    const T x_hat = in.normalised(i, tc), x_hat_tangent = along.normalised(in, i, tc);
    const T a = (y < 0 ? T(0) : dy[y]) - B[tc] - x_hat * G[tc];
    const T a_tangent = (y < 0 ? T(0) : dy_tangent[y]) - B_tangent[tc] - x_hat_tangent * G[tc] - x_hat * G_tangent[tc];
    const T gamma = in.scale(tc), r = in.rstd[tc];
    const T moved = (along.gamma ? along.gamma[tc] : T(0)) - (along.x ? gamma * r * along.s[tc] : T(0));
    dx[i] = moved * r * a + gamma * r * a_tangent;
  }
};

// --- the layer ------------------------------------------------------------------------------------

template <class T>
class BatchNorm final : public Layer<T> {
 public:
  BatchNorm(const Node& node, const Node* relu, const Node* max_pool, const LayerContext<T>& context)
      : device_(context.device),
        scratch_(context.scratch),
        mode_(context.request.batch_norm),
        eps_(static_cast<T>(node.number)),
        x_(context.value(node.inputs[0])),
        y_(context.value((max_pool ? *max_pool
                          : relu   ? *relu
                                   : node)
                             .output)),
        window_(max_pool ? max_pool->window : Window{}),
        relu_(relu != nullptr),
        chooses_(relu != nullptr || max_pool != nullptr),
        weight_(node.weight),
        bias_(node.bias) {
    if (mode_ != BatchNormMode::running) return;
    running_mean_ = context.request.buffers[static_cast<size_t>(node.running_mean)];
    running_var_ = context.request.buffers[static_cast<size_t>(node.running_var)];
  }

  // m, r, B, G, and the gradients that queries leave for m and var; then what is chosen
  int64_t state_size(int64_t samples) const override { return 6 * x_.channels + (chooses_ ? samples * y_.size() : 0); }
  int64_t tangent_state_size(int64_t) const override { return 4 * x_.channels; }  // ṁ, s, Ḃ, Ġ
  ScratchSize scratch_size(int64_t samples) const override {
    return {0, 0, sums_size(samples * pixels(), x_.channels)};
  }

  void forward(const Parameters<T>& theta, const Primal<T>& p) override {
    const int64_t tc = p.tasks * x_.channels;
    const NormInput<T> in = input(theta, p);
    each(device_, 4 * tc, Zero<T>{state(p, 2)});
    if (mode_ == BatchNormMode::running) {
      each(device_, tc, RunningStatistics<T>{running_mean_, running_var_, eps_, x_.channels, state(p, 0), state(p, 1)});
    } else if (reads_partner(p)) {
      each(device_, 2 * tc, Copy<T>{p.partner, p.state});
    } else {
      sum_rows(device_, p.tasks, x_rows(p), x_.channels, scratch_.sums, ValueTerms<T>{in},
               StoreMeans<T>{p.valid, pixels(), x_.channels, state(p, 0), nullptr});
      sum_rows(device_, p.tasks, x_rows(p), x_.channels, scratch_.sums, SquareTerms<T>{in},
               StoreRstd<T>{p.valid, pixels(), x_.channels, eps_, state(p, 1)});
    }
    each(device_, p.tasks * p.samples * y_.size(), Normalise<T>{in, relu_, p.y, chosen(p)});
  }

  void backward(const Parameters<T>& theta, const Primal<T>& p, const Parameters<T>& gradient) override {
    const NormInput<T> in = input(theta, p);
    const bool with_statistics = !is_fixed(p);
    T* partner_mean = reads_partner(p) ? p.partner + 4 * p.tasks * x_.channels : nullptr;
    T* partner_var = reads_partner(p) ? p.partner + 5 * p.tasks * x_.channels : nullptr;
    sum_rows(device_, p.tasks, y_rows(p), x_.channels, scratch_.sums, GradientTerms<T>{in, p.dy},
             StoreGradients<T>{in, p.valid, pixels(), at(gradient, bias_), at(gradient, weight_),
                               with_statistics ? state(p, 2) : nullptr, with_statistics ? state(p, 3) : nullptr,
                               partner_mean, partner_var});
    if (!p.dx[0]) return;
    const bool from_queries = mode_ == BatchNormMode::support && with_statistics;
    each(device_, p.tasks * p.samples * x_.size(),
         InputGradient<T>{in, p.dy, state(p, 2), state(p, 3), from_queries ? state(p, 4) : nullptr,
                          from_queries ? state(p, 5) : nullptr, p.valid, pixels(), p.dx[0]});
  }

  void forward_tangent(const Parameters<T>& theta, const Parameters<T>& direction, const Primal<T>& p,
                       const Tangent<T>& t) override {
    const int64_t tc = p.tasks * x_.channels;
    const NormInput<T> in = input(theta, p);
    if (t.x[0] && !is_fixed(p)) {
      sum_rows(device_, p.tasks, x_rows(p), x_.channels, scratch_.sums, TangentTerms<T>{in, t.x[0]},
               StoreMeans<T>{p.valid, pixels(), x_.channels, t.state, t.state + tc});
    } else {
      each(device_, 2 * tc, Zero<T>{t.state});
    }
    each(device_, p.tasks * p.samples * y_.size(), OutputTangent<T>{in, along(direction, p, t), t.y});
  }

  void backward_tangent(const Parameters<T>& theta, const Parameters<T>& direction, const Primal<T>& p,
                        const Tangent<T>& t, const Parameters<T>& product) override {
    const int64_t tc = p.tasks * x_.channels;
    const NormInput<T> in = input(theta, p);
    const NormDirection<T> to = along(direction, p, t);
    T *B_tangent = t.state + 2 * tc, *G_tangent = t.state + 3 * tc;
    const bool with_statistics = !is_fixed(p);
    if (!with_statistics) each(device_, 2 * tc, Zero<T>{B_tangent});
    sum_rows(device_, p.tasks, y_rows(p), x_.channels, scratch_.sums, GradientTangentTerms<T>{in, to, p.dy, t.dy},
             StoreGradients<T>{in, p.valid, pixels(), at(product, bias_), at(product, weight_),
                               with_statistics ? B_tangent : nullptr, with_statistics ? G_tangent : nullptr, nullptr,
                               nullptr});
    if (!t.dx[0]) return;
    each(device_, p.tasks * p.samples * x_.size(),
         InputGradientTangent<T>{in, to, p.dy, t.dy, state(p, 2), state(p, 3), B_tangent, G_tangent, t.dx[0]});
  }

 private:
  bool reads_partner(const Primal<T>& p) const { return mode_ == BatchNormMode::support && p.side == Side::query; }
  bool is_fixed(const Primal<T>& p) const { return mode_ == BatchNormMode::running || reads_partner(p); }
  int64_t pixels() const { return x_.height * x_.width; }
  int64_t x_rows(const Primal<T>& p) const { return p.samples * pixels(); }
  int64_t y_rows(const Primal<T>& p) const { return p.samples * y_.height * y_.width; }

  // Piece `index` of the state: see state_size.
  T* state(const Primal<T>& p, int index) const { return p.state + index * p.tasks * x_.channels; }
  T* chosen(const Primal<T>& p) const { return chooses_ ? state(p, 6) : nullptr; }

  NormInput<T> input(const Parameters<T>& theta, const Primal<T>& p) const {
    const NormShape shape{p.samples, x_.height, x_.width, x_.channels, window_.kernel_height, window_.kernel_width,
                          y_.height, y_.width};
    return {shape, p.x[0], state(p, 0), state(p, 1), at(theta, weight_), at(theta, bias_), chosen(p), p.mask};
  }

  NormDirection<T> along(const Parameters<T>& direction, const Primal<T>& p, const Tangent<T>& t) const {
    return {t.x[0], t.state, t.state + p.tasks * x_.channels, at(direction, weight_), at(direction, bias_)};
  }

  const Device& device_;
  const Scratch<T>& scratch_;
  const BatchNormMode mode_;
  const T eps_;
  const Shape x_, y_;
  const Window window_;
  const bool relu_, chooses_;
  const int weight_, bias_;
  const T *running_mean_ = nullptr, *running_var_ = nullptr;
};

}  // namespace

template <class T>
std::unique_ptr<Layer<T>> make_batch_norm(const Node& node, const Node* relu, const Node* max_pool,
                                          const LayerContext<T>& context) {
  return std::make_unique<BatchNorm<T>>(node, relu, max_pool, context);
}

template std::unique_ptr<Layer<float>> make_batch_norm(const Node&, const Node*, const Node*,
                                                       const LayerContext<float>&);
template std::unique_ptr<Layer<double>> make_batch_norm(const Node&, const Node*, const Node*,
                                                        const LayerContext<double>&);

}  // namespace innerloop::gpu
