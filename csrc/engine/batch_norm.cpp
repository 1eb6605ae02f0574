// y = γ x̂ + β with x̂ = (x − m) r, r = 1/√(var + ε), channel by channel.
//
// m and var are those of the pass itself (batch statistics), or fixed: the running ones, or under bn = support, in a
// query pass, those of the support pass. With n = samples × pixels, B = Σdy/n and G = Σ(dy x̂)/n:
//
//     dγ = Σ dy x̂,   dβ = Σ dy,   dx = γ r A with A = dy − B − x̂ G                        (fixed: B = G = 0)
//
// Along ẋ, with ṁ = Σẋ/n and s = Σ(x̂ ẋ)/n, so that ṙ = −r² s (fixed: ṁ = s = 0):
//
//     x̂′ = r (ẋ − ṁ − s x̂),   ẏ = γ̇ x̂ + γ x̂′ + β̇
//     Ȧ = dẏ − Ḃ − x̂′ G − x̂ Ġ,   Ḃ = Σdẏ/n,   Ġ = Σ(dẏ x̂ + dy x̂′)/n
//     dẋ = (γ̇ r − γ r² s) A + γ r Ȧ
#include <algorithm>
#include <cmath>
#include <vector>

#include "engine/layers.h"

namespace innerloop::INNERLOOP_ISA {
namespace {

template <class T>
class BatchNorm final : public Layer<T> {
 public:
  BatchNorm(const Node& node, const LayerContext<T>& context)
      : mode_(context.request.batch_norm),
        eps_(static_cast<T>(node.number)),
        x_(context.value(node.inputs[0])),
        y_(context.value(node.output)),
        channels_(x_.stride),
        weight_(context.offset(node.weight)),
        bias_(context.offset(node.bias)),
        ones_(context.memory.take(channels_)),
        zeros_(context.memory.take(channels_)),
        running_mean_(context.memory.take(channels_)),
        running_rstd_(context.memory.take(channels_)),
        row_sums_{context.memory.take(channels_), context.memory.take(channels_)},
        sums_{std::vector<double>(static_cast<size_t>(channels_)),
              std::vector<double>(static_cast<size_t>(channels_))} {
    std::fill_n(ones_, channels_, T(1));
    if (mode_ != BatchNormMode::running) return;
    const T* mean = context.request.buffers[static_cast<size_t>(node.running_mean)];
    const T* var = context.request.buffers[static_cast<size_t>(node.running_var)];
    for (int64_t c = 0; c < x_.shape.channels; ++c) {
      running_mean_[c] = mean[c];
      running_rstd_[c] = 1 / std::sqrt(var[c] + eps_);
    }
  }

  // m, r, B, G, and the gradients that queries leave for m and var
  int64_t state_size(int64_t) const override { return 6 * channels_; }
  int64_t tangent_state_size(int64_t) const override { return 2 * channels_; }  // ṁ, s

  void forward(const T* theta, const Primal<T>& p) override {
    T *mean = p.state, *rstd = p.state + channels_;
    std::fill_n(p.state + 2 * channels_, 4 * channels_, T(0));
    if (mode_ == BatchNormMode::running) {
      std::copy_n(running_mean_, channels_, mean);
      std::copy_n(running_rstd_, channels_, rstd);
    } else if (reads_partner(p)) {
      std::copy_n(p.partner, 2 * channels_, mean);
    } else {
      statistics(p, mean, rstd);
    }
    const T *gamma = weight_of(theta), *beta = bias_of(theta);
    for_pixels(p.samples, [&](int64_t x, int64_t y, int64_t) {
      const T* __restrict from = p.x[0] + x;
      T* __restrict to = p.y + y;
      for (int64_t c = 0; c < channels_; ++c) to[c] = (from[c] - mean[c]) * rstd[c] * gamma[c] + beta[c];
    });
  }

  void backward(const T* theta, const Primal<T>& p, T* gradient) override {
    const T *mean = p.state, *rstd = p.state + channels_, *gamma = weight_of(theta);
    T *B = p.state + 2 * channels_, *G = p.state + 3 * channels_;
    reduce(p.samples, [&](int64_t c, int64_t x, int64_t dense) {
      const T dy = p.dy[dense + c];
      return std::pair{dy, dy * (p.x[0][x + c] - mean[c]) * rstd[c]};
    });
    add_to(gradient);
    if (reads_partner(p)) leave_for_partner(p, gamma, rstd);
    if (is_fixed(p)) {
      if (p.dx[0]) scale_by(gamma, rstd, p.dy, p.samples, p.dx[0]);
      return;
    }
    const T n = count(p.samples);
    for (int64_t c = 0; c < channels_; ++c) {
      B[c] = static_cast<T>(sums_[0][static_cast<size_t>(c)]) / n;
      G[c] = static_cast<T>(sums_[1][static_cast<size_t>(c)]) / n;
    }
    if (!p.dx[0]) return;
    for_pixels(p.samples, [&](int64_t x, int64_t, int64_t dense) {
      const T* __restrict from = p.x[0] + x;
      const T* __restrict dy = p.dy + dense;
      T* __restrict dx = p.dx[0] + dense;
      for (int64_t c = 0; c < channels_; ++c) {
        dx[c] = gamma[c] * rstd[c] * (dy[c] - B[c] - (from[c] - mean[c]) * rstd[c] * G[c]);
      }
    });
    if (mode_ == BatchNormMode::support) take_from_queries(p, mean, n);
  }

  void forward_tangent(const T* theta, const T* direction, const Primal<T>& p, const Tangent<T>& t) override {
    const T *mean = p.state, *rstd = p.state + channels_, *gamma = weight_of(theta);
    T *mean_tangent = t.state, *s = t.state + channels_;
    std::fill_n(t.state, 2 * channels_, T(0));
    if (t.x[0] && !is_fixed(p)) {
      reduce(p.samples, [&](int64_t c, int64_t x, int64_t) {
        const T along = t.x[0][x + c];
        return std::pair{along, along * (p.x[0][x + c] - mean[c]) * rstd[c]};
      });
      const T n = count(p.samples);
      for (int64_t c = 0; c < channels_; ++c) {
        mean_tangent[c] = static_cast<T>(sums_[0][static_cast<size_t>(c)]) / n;
        s[c] = static_cast<T>(sums_[1][static_cast<size_t>(c)]) / n;
      }
    }
    const T* gamma_tangent = direction && weight_ >= 0 ? direction + weight_ : zeros_;
    const T* beta_tangent = direction && bias_ >= 0 ? direction + bias_ : zeros_;
    for_pixels(p.samples, [&](int64_t x, int64_t y, int64_t) {
      const T* __restrict from = p.x[0] + x;
      T* __restrict to = t.y + y;
      for (int64_t c = 0; c < channels_; ++c) {
        to[c] = gamma_tangent[c] * (from[c] - mean[c]) * rstd[c] + beta_tangent[c];
      }
      if (!t.x[0]) return;
      const T* __restrict along = t.x[0] + x;
      for (int64_t c = 0; c < channels_; ++c) {
        to[c] += gamma[c] * rstd[c] * (along[c] - mean_tangent[c] - s[c] * (from[c] - mean[c]) * rstd[c]);
      }
    });
  }

  void backward_tangent(const T* theta, const T* direction, const Primal<T>& p, const Tangent<T>& t,
                        T* product) override {
    const T *mean = p.state, *rstd = p.state + channels_, *B = p.state + 2 * channels_, *G = p.state + 3 * channels_;
    const T *mean_tangent = t.state, *s = t.state + channels_, *gamma = weight_of(theta);
    const T* gamma_tangent = direction && weight_ >= 0 ? direction + weight_ : zeros_;
    const auto normalised = [&](int64_t c, int64_t x) { return (p.x[0][x + c] - mean[c]) * rstd[c]; };
    const auto normalised_tangent = [&](int64_t c, int64_t x, T x_hat) {
      return t.x[0] ? rstd[c] * (t.x[0][x + c] - mean_tangent[c] - s[c] * x_hat) : T(0);
    };
    reduce(p.samples, [&](int64_t c, int64_t x, int64_t dense) {
      const T x_hat = normalised(c, x), dy_tangent = t.dy[dense + c];
      return std::pair{dy_tangent, dy_tangent * x_hat + p.dy[dense + c] * normalised_tangent(c, x, x_hat)};
    });
    add_to(product);
    if (!t.dx[0]) return;
    const T per_sample = is_fixed(p) ? T(0) : 1 / count(p.samples);
    T *B_tangent = row_sums_[0], *G_tangent = row_sums_[1];
    for (int64_t c = 0; c < channels_; ++c) {
      B_tangent[c] = static_cast<T>(sums_[0][static_cast<size_t>(c)]) * per_sample;
      G_tangent[c] = static_cast<T>(sums_[1][static_cast<size_t>(c)]) * per_sample;
    }
    for_pixels(p.samples, [&](int64_t x, int64_t, int64_t dense) {
      T* to = t.dx[0] + dense;
      for (int64_t c = 0; c < channels_; ++c) {
        const T x_hat = normalised(c, x), x_hat_tangent = normalised_tangent(c, x, x_hat);
        const T a = p.dy[dense + c] - B[c] - x_hat * G[c];
        const T a_tangent = t.dy[dense + c] - B_tangent[c] - x_hat_tangent * G[c] - x_hat * G_tangent[c];
        to[c] = (gamma_tangent[c] - gamma[c] * rstd[c] * s[c]) * rstd[c] * a + gamma[c] * rstd[c] * a_tangent;
      }
    });
  }

 private:
  bool reads_partner(const Primal<T>& p) const { return mode_ == BatchNormMode::support && p.side == Side::query; }
  bool is_fixed(const Primal<T>& p) const { return mode_ == BatchNormMode::running || reads_partner(p); }
  T count(int64_t samples) const { return static_cast<T>(samples * x_.pixels()); }
  const T* weight_of(const T* theta) const { return weight_ < 0 ? ones_ : theta + weight_; }
  const T* bias_of(const T* theta) const { return bias_ < 0 ? zeros_ : theta + bias_; }

  // Calls visit(offset in x, offset in y, offset in dense gradients) for every pixel of every sample.
  template <class Visit>
  void for_pixels(int64_t samples, const Visit& visit) const {
    int64_t dense = 0;
    for (int64_t n = 0; n < samples; ++n) {
      for (int64_t h = 0; h < x_.shape.height; ++h) {
        for (int64_t w = 0; w < x_.shape.width; ++w, dense += channels_) {
          visit(x_.row(n, h) + w * channels_, y_.row(n, h) + w * channels_, dense);
        }
      }
    }
  }

  // sums_ = the sums over all pixels of the pair terms(channel, offset in x, offset in dense gradients); within a row
  // of pixels in T, across rows in double.
  template <class TermsOf>
  void reduce(int64_t samples, const TermsOf& terms) {
    for (std::vector<double>& sums : sums_) std::ranges::fill(sums, 0.0);
    int64_t dense = 0;
    for (int64_t n = 0; n < samples; ++n) {
      for (int64_t h = 0; h < x_.shape.height; ++h) {
        T* __restrict first = row_sums_[0];
        T* __restrict second = row_sums_[1];
        std::fill_n(first, channels_, T(0));
        std::fill_n(second, channels_, T(0));
        for (int64_t w = 0; w < x_.shape.width; ++w, dense += channels_) {
          const int64_t x = x_.row(n, h) + w * channels_;
          for (int64_t c = 0; c < channels_; ++c) {
            const auto [a, b] = terms(c, x, dense);
            first[c] += a;
            second[c] += b;
          }
        }
        for (int64_t c = 0; c < channels_; ++c) {
          sums_[0][static_cast<size_t>(c)] += static_cast<double>(first[c]);
          sums_[1][static_cast<size_t>(c)] += static_cast<double>(second[c]);
        }
      }
    }
  }

  // In two passes: the variance from differences to the mean.
  void statistics(const Primal<T>& p, T* mean, T* rstd) {
    const T n = count(p.samples);
    reduce(p.samples, [&](int64_t c, int64_t x, int64_t) { return std::pair{p.x[0][x + c], T(0)}; });
    for (int64_t c = 0; c < channels_; ++c) mean[c] = static_cast<T>(sums_[0][static_cast<size_t>(c)]) / n;
    reduce(p.samples, [&](int64_t c, int64_t x, int64_t) {
      const T difference = p.x[0][x + c] - mean[c];
      return std::pair{difference * difference, T(0)};
    });
    for (int64_t c = 0; c < channels_; ++c) {
      rstd[c] = 1 / std::sqrt(static_cast<T>(sums_[0][static_cast<size_t>(c)]) / n + eps_);
    }
  }

  // The sums are those of dβ and dγ.
  void add_to(T* gradient) const {
    if (!gradient) return;
    for (int64_t c = 0; c < channels_; ++c) {
      if (bias_ >= 0) gradient[bias_ + c] += static_cast<T>(sums_[0][static_cast<size_t>(c)]);
      if (weight_ >= 0) gradient[weight_ + c] += static_cast<T>(sums_[1][static_cast<size_t>(c)]);
    }
  }

  void scale_by(const T* gamma, const T* rstd, const T* dy, int64_t samples, T* dx) const {
    for (int64_t pixel = 0; pixel < samples * x_.pixels(); ++pixel, dy += channels_, dx += channels_) {
      for (int64_t c = 0; c < channels_; ++c) dx[c] = gamma[c] * rstd[c] * dy[c];
    }
  }

  // ∂L/∂m = −γ r Σdy and ∂L/∂var = −γ r² Σ(dy x̂)/2 of the statistics that this query pass read.
  void leave_for_partner(const Primal<T>& p, const T* gamma, const T* rstd) const {
    T *for_mean = p.partner + 4 * channels_, *for_var = p.partner + 5 * channels_;
    for (int64_t c = 0; c < channels_; ++c) {
      for_mean[c] -= gamma[c] * rstd[c] * static_cast<T>(sums_[0][static_cast<size_t>(c)]);
      for_var[c] -= gamma[c] * rstd[c] * rstd[c] * static_cast<T>(sums_[1][static_cast<size_t>(c)]) / 2;
    }
  }

  // m = Σx/n and var = Σ(x − m)²/n take that gradient on to x.
  void take_from_queries(const Primal<T>& p, const T* mean, T n) const {
    const T *for_mean = p.state + 4 * channels_, *for_var = p.state + 5 * channels_;
    for_pixels(p.samples, [&](int64_t x, int64_t, int64_t dense) {
      for (int64_t c = 0; c < channels_; ++c) {
        p.dx[0][dense + c] += (for_mean[c] + 2 * for_var[c] * (p.x[0][x + c] - mean[c])) / n;
      }
    });
  }

  const BatchNormMode mode_;
  const T eps_;
  const ValueLayout x_, y_;
  const int64_t channels_, weight_, bias_;
  T *ones_, *zeros_, *running_mean_, *running_rstd_;
  T* row_sums_[2];
  std::vector<double> sums_[2];
};

}  // namespace

template <class T>
std::unique_ptr<Layer<T>> make_batch_norm(const Node& node, const LayerContext<T>& context) {
  return std::make_unique<BatchNorm<T>>(node, context);
}

template std::unique_ptr<Layer<float>> make_batch_norm(const Node&, const LayerContext<float>&);
template std::unique_ptr<Layer<double>> make_batch_norm(const Node&, const LayerContext<double>&);

}  // namespace innerloop::INNERLOOP_ISA
