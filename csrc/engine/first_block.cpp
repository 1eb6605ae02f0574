// What conv_block.cpp computes, for a block whose input x does not move: with n pixels p, patches x_p, their mean μ and
// covariance Σ (patch_moments.h), W the weights of a channel,
//
//     z_p = Wᵀx_p + b,   m = Wᵀμ + b,   r = 1/√(WᵀΣW + ε),   x̂_p = (z_p − m) r,   y = pool(relu(γ x̂ + β))
//
// z is never stored, only x̂ of the chosen elements. Let D = Σ x_p dŷ_p, where dŷ is dy at the chosen elements and 0
// elsewhere: a sum over the outputs alone. Then, since Σ x_p x̂_p / n = r ΣW, everything about all pixels is a product
// of small matrices:
//
//     B = Σ dŷ/n,   G = r (WᵀD + (b − m) Σ dŷ)/n
//     dW = Σ x_p γ r (dŷ_p − B − x̂_p G) = γ r A,   A = D − n (B μ + G r ΣW)
//
// and along Ẇ, γ̇, β̇, with ṁ = Ẇᵀμ (that of b cancels), s = r WᵀΣẆ, Ḋ = Σ x_p dẏ_p and x̂′ = r (ż − ṁ − s x̂):
//
//     Ḃ = Σ dẏ/n,   Ġ = r (WᵀḊ + (b − m) Σ dẏ + ẆᵀD − ṁ Σ dŷ)/n − r s G
//     dẆ = (γ̇ r − γ r² s) A + γ r Ȧ,   Ȧ = Ḋ − n (Ḃ μ + G r (ΣẆ − s r ΣW) + Ġ r ΣW)
#include "engine/first_block.h"

#include <algorithm>
#include <cmath>

#include "engine/block_vectors.h"
#include "engine/convolution_shape.h"
#include "engine/patch_moments.h"
#include "kernels/chosen_patches.h"

namespace innerloop::INNERLOOP_ISA {
namespace {

// Larger patches have more moments than the block has work.
constexpr int64_t largest_patch = 32;

template <class T>
class FirstBlock final : public Layer<T> {
  static constexpr int L = lanes<T>;

  // What a pass leaves: by channel m, r, B, G, by patch element and channel D, by output the choice and its x̂.
  struct State {
    T *mean, *rstd, *B, *G, *D, *x_hat;
    Index<T>* choice;
  };
  struct TangentState {  // ṁ, s
    T *mean, *s;
  };

 public:
  FirstBlock(const BlockNodes& nodes, const LayerContext<T>& context)
      : eps_(nodes.norm->number),
        x_(context.value(nodes.conv->inputs[0])),
        y_(context.value(nodes.pool->output)),
        channels_(y_.stride),
        convolution_(convolution_shape(nodes.conv->window, x_, channels_, 0), WinogradUse::off),
        segments_(convolution_.shape().kernel_height),
        segment_(convolution_.shape().kernel_width * x_.stride),
        patch_(segments_ * segment_),
        origin_((x_.halo - convolution_.shape().padding_height) * x_.row_pitch() +
                (x_.halo - convolution_.shape().padding_width) * x_.stride),
        z_row_(convolution_.output_width() * channels_),
        dz_row_((convolution_.output_width() + 2 * convolution_.gradient_halo()) * channels_),
        looks_up_(has_table_lookup && sizeof(T) == 4 && segments_ == 3 && segment_ == 3 * x_.stride &&
                  (x_.stride == 1 || x_.stride == 3)),
        weight_(context.offset(nodes.conv->weight)),
        conv_bias_(context.offset(nodes.conv->bias)),
        gamma_(context.offset(nodes.norm->weight)),
        beta_(context.offset(nodes.norm->bias)),
        ones_(context.memory.take(channels_)),
        zeros_(context.memory.take(channels_)),
        start_(context.memory.take(channels_)),
        sums_(context.memory.take(channels_)),
        D_tangent_(context.memory.take(patch_ * channels_)),
        z_tangent_(context.memory.take(y_.dense_row())),
        image_(looks_up_
                   ? nullptr
                   : context.memory.take((convolution_.output_height() + 2 * convolution_.gradient_halo()) * dz_row_)),
        moments_{PatchMoments<T>(convolution_.shape()), PatchMoments<T>(convolution_.shape())} {
    std::fill_n(ones_, channels_, T(1));
  }

  int64_t state_size(int64_t samples) const override {
    return (4 + patch_) * channels_ + 2 * samples * y_.dense_size();
  }
  int64_t tangent_state_size(int64_t) const override { return 2 * channels_; }

  void start_task() override { has_moments_[0] = has_moments_[1] = false; }

  void forward(const T* theta, const Primal<T>& p) override {
    const PatchMoments<T>& moments = moments_of(p);
    const State state = state_of(p);
    const T *w = theta + weight_, *bias = conv_bias_ < 0 ? zeros_ : theta + conv_bias_;
    moments.covariance_times(w, channels_, covariance_w_);
    for (int64_t c = 0; c < channels_; ++c) {
      double mean = static_cast<double>(bias[c]), variance = 0;
      for (int64_t k = 0; k < patch_; ++k) {
        const double weight = static_cast<double>(w[k * channels_ + c]);
        mean += weight * moments.mean(k);
        variance += weight * at(covariance_w_, k, c);
      }
      state.mean[c] = static_cast<T>(mean);
      // 0 in the padding, which must stay finite whatever ε is.
      state.rstd[c] = c < y_.shape.channels ? static_cast<T>(1 / std::sqrt(std::max(variance, 0.0) + eps_)) : T(0);
      start_[c] = static_cast<T>(static_cast<double>(bias[c]) - mean);
    }
    for (int64_t n = 0; n < p.samples; ++n) {
      for (int64_t row = 0; row < y_.shape.height; ++row) forward_row(theta, state, p, n, row);
    }
  }

  void backward(const T* theta, const Primal<T>& p, T* gradient) override {
    const PatchMoments<T>& moments = moments_of(p);
    const State state = state_of(p);
    std::fill_n(state.D, patch_ * channels_, T(0));
    std::fill_n(sums_, channels_, T(0));
    add_chosen(p, state, p.dy, state.D);
    const T *w = theta + weight_, *gamma = gamma_of(theta);
    const double n = moments.count();
    moments.covariance_times(w, channels_, covariance_w_);
    for (int64_t c = 0; c < channels_; ++c) {
      const double r = state.rstd[c], sum = sums_[c];
      const double sum_x = r * (dot(w, state.D, c) + bias_minus_mean(theta, state, c) * sum);
      state.B[c] = static_cast<T>(sum / n);
      state.G[c] = static_cast<T>(sum_x / n);
      if (!gradient) continue;
      if (beta_ >= 0) gradient[beta_ + c] += static_cast<T>(sum);
      if (gamma_ >= 0) gradient[gamma_ + c] += static_cast<T>(sum_x);
      for (int64_t k = 0; k < patch_; ++k) {
        const double A = state.D[k * channels_ + c] - (sum * moments.mean(k) + sum_x * r * at(covariance_w_, k, c));
        gradient[weight_ + k * channels_ + c] += static_cast<T>(gamma[c] * r * A);
      }
    }
  }

  void forward_tangent(const T* theta, const T* direction, const Primal<T>& p, const Tangent<T>& t) override {
    const PatchMoments<T>& moments = moments_of(p);
    const State state = state_of(p);
    const TangentState tangent = tangent_of(t);
    const T *w = theta + weight_, *w_dot = direction + weight_;
    moments.covariance_times(w_dot, channels_, covariance_w_dot_);
    for (int64_t c = 0; c < channels_; ++c) {
      double mean = 0, s = 0;
      for (int64_t k = 0; k < patch_; ++k) {
        mean += static_cast<double>(w_dot[k * channels_ + c]) * moments.mean(k);
        s += static_cast<double>(w[k * channels_ + c]) * at(covariance_w_dot_, k, c);
      }
      tangent.mean[c] = static_cast<T>(mean);
      tangent.s[c] = static_cast<T>(s * state.rstd[c]);
    }
    const T *gamma = gamma_of(theta), *gamma_dot = direction_of(direction, gamma_),
            *beta_dot = direction_of(direction, beta_);
    for (int64_t n = 0; n < p.samples; ++n) {
      if (!looks_up_) convolution_.tangent(1, {{p.x[0] + n * x_.sample_size(), w_dot}}, nullptr, image_, nullptr);
      for (int64_t row = 0; row < y_.shape.height; ++row) {
        const int64_t dense = n * y_.dense_size() + row * y_.dense_row();
        chosen_z_tangent(p.x[0], n, row, state.choice + dense, w_dot);
        for (int64_t c = 0; c < channels_; c += L) {
          const Vector<T> rstd = load(state.rstd + c), mean_dot = load(tangent.mean + c), s = load(tangent.s + c);
          const Vector<T> scale = load(gamma + c), scale_dot = load(gamma_dot + c), shift_dot = load(beta_dot + c);
          T* y = t.y + y_.row(n, row) + c;
          for (int64_t column = 0; column < y_.dense_row(); column += channels_) {
            const Vector<T> x_hat = load(state.x_hat + dense + column + c);
            const Vector<T> x_hat_dot = rstd * (load(z_tangent_ + column + c) - mean_dot - s * x_hat);
            const IndexVector<T> choice = load_indices<T>(state.choice + dense + column + c);
            store(y + column, where<T>(choice >= 0, scale_dot * x_hat + scale * x_hat_dot + shift_dot));
          }
        }
      }
    }
  }

  void backward_tangent(const T* theta, const T* direction, const Primal<T>& p, const Tangent<T>& t,
                        T* product) override {
    if (!product) return;
    const PatchMoments<T>& moments = moments_of(p);
    const State state = state_of(p);
    const TangentState tangent = tangent_of(t);
    std::fill_n(D_tangent_, patch_ * channels_, T(0));
    std::fill_n(sums_, channels_, T(0));
    add_chosen(p, state, t.dy, D_tangent_);
    const T *w = theta + weight_, *w_dot = direction + weight_;
    const T *gamma = gamma_of(theta), *gamma_dot = direction_of(direction, gamma_);
    const double n = moments.count();
    moments.covariance_times(w, channels_, covariance_w_);
    moments.covariance_times(w_dot, channels_, covariance_w_dot_);
    for (int64_t c = 0; c < channels_; ++c) {
      const double r = state.rstd[c], s = tangent.s[c], B = state.B[c], G = state.G[c];
      const double sum = sums_[c];
      const double sum_x = r * (dot(w, D_tangent_, c) + bias_minus_mean(theta, state, c) * sum +
                                dot(w_dot, state.D, c) - tangent.mean[c] * B * n - s * G * n);
      if (beta_ >= 0) product[beta_ + c] += static_cast<T>(sum);
      if (gamma_ >= 0) product[gamma_ + c] += static_cast<T>(sum_x);
      const double scale = gamma[c] * r, scale_dot = gamma_dot[c] * r - scale * r * s;
      for (int64_t k = 0; k < patch_; ++k) {
        const double mu = moments.mean(k), along_w = at(covariance_w_, k, c), along_w_dot = at(covariance_w_dot_, k, c);
        const double A = state.D[k * channels_ + c] - n * (B * mu + G * r * along_w);
        const double A_dot = D_tangent_[k * channels_ + c] -
                             (sum * mu + n * G * r * (along_w_dot - s * r * along_w) + sum_x * r * along_w);
        product[weight_ + k * channels_ + c] += static_cast<T>(scale_dot * A + scale * A_dot);
      }
    }
  }

 private:
  const PatchMoments<T>& moments_of(const Primal<T>& p) {
    const size_t side = static_cast<size_t>(p.side);
    if (!has_moments_[side]) moments_[side].compute(p.x[0], p.samples);
    has_moments_[side] = true;
    return moments_[side];
  }

  State state_of(const Primal<T>& p) const {
    T* D = p.state + 4 * channels_;
    T* x_hat = D + patch_ * channels_;
    return {p.state,
            p.state + channels_,
            p.state + 2 * channels_,
            p.state + 3 * channels_,
            D,
            x_hat,
            reinterpret_cast<Index<T>*>(x_hat + p.samples * y_.dense_size())};
  }
  TangentState tangent_of(const Tangent<T>& t) const { return {t.state, t.state + channels_}; }

  const T* gamma_of(const T* theta) const { return gamma_ < 0 ? ones_ : theta + gamma_; }
  const T* beta_of(const T* theta) const { return beta_ < 0 ? zeros_ : theta + beta_; }
  const T* direction_of(const T* direction, int64_t offset) const { return offset >= 0 ? direction + offset : zeros_; }
  double bias_minus_mean(const T* theta, const State& state, int64_t c) const {
    return (conv_bias_ < 0 ? 0.0 : static_cast<double>(theta[conv_bias_ + c])) - static_cast<double>(state.mean[c]);
  }
  double at(const std::vector<double>& matrix, int64_t k, int64_t c) const {
    return matrix[static_cast<size_t>(k * channels_ + c)];
  }
  // Column c of a times column c of b.
  double dot(const T* a, const T* b, int64_t c) const {
    double sum = 0;
    for (int64_t k = 0; k < patch_; ++k) {
      sum += static_cast<double>(a[k * channels_ + c]) * static_cast<double>(b[k * channels_ + c]);
    }
    return sum;
  }

  // The first patch of a row of windows.
  const T* patch_at(const T* x, int64_t n, int64_t row) const {
    return x + n * x_.sample_size() + origin_ + 2 * row * x_.row_pitch();
  }

  void forward_row(const T* theta, const State& state, const Primal<T>& p, int64_t n, int64_t row) const {
    int64_t c = 0;
    if constexpr (vector_registers == 32) {
      for (; c + 4 * L <= channels_; c += 4 * L) forward_windows<4, 1>(theta, state, p, n, row, c);
      for (; c + 2 * L <= channels_; c += 2 * L) forward_windows<2, 2>(theta, state, p, n, row, c);
    } else {
      for (; c + 2 * L <= channels_; c += 2 * L) forward_windows<2, 1>(theta, state, p, n, row, c);
    }
    for (; c < channels_; c += L) forward_windows<1, 2>(theta, state, p, n, row, c);
  }

  template <int V, int Q>
  void forward_windows(const T* theta, const State& state, const Primal<T>& p, int64_t n, int64_t row,
                       int64_t c) const {
    const int64_t whole = y_.shape.width / Q * Q;
    pool_windows<V, Q>(theta, state, p, n, row, c, 0, whole);
    if (whole < y_.shape.width) pool_windows<V, 1>(theta, state, p, n, row, c, whole, y_.shape.width);
  }

  // Convolves, normalises, rectifies and pools Q windows at a time, V vectors of channels from c on, without leaving
  // the registers.
  template <int V, int Q>
  void pool_windows(const T* theta, const State& state, const Primal<T>& p, int64_t n, int64_t row, int64_t c,
                    int64_t first, int64_t last) const {
    const T *gamma = gamma_of(theta), *beta = beta_of(theta);
    const int64_t dense = n * y_.dense_size() + row * y_.dense_row();
    for (int64_t column = first; column < last; column += Q) {
      Vector<T> centred[4 * Q][V];  // z − m of two rows of 2Q pixels
      INNERLOOP_UNROLL
      for (int v = 0; v < V; ++v) {
        INNERLOOP_UNROLL
        for (int i = 0; i < 4 * Q; ++i) centred[i][v] = load(start_ + c + v * L);
      }
      convolve<V, Q>(patch_at(p.x[0], n, row) + 2 * column * x_.stride, theta + weight_ + c, centred);
      INNERLOOP_UNROLL
      for (int v = 0; v < V; ++v) {
        const int64_t channel = c + v * L;
        const Vector<T> rstd = load(state.rstd + channel);
        const Vector<T> scale = load(gamma + channel) * rstd, shift = load(beta + channel);
        INNERLOOP_UNROLL
        for (int q = 0; q < Q; ++q) {
          Vector<T> chosen = centred[2 * q][v];
          Maximum<T> maximum(chosen * scale + shift);
          INNERLOOP_UNROLL
          for (int i = 1; i < 4; ++i) {
            const Vector<T> other = centred[i / 2 * 2 * Q + 2 * q + i % 2][v];
            chosen = maximum.offer(other * scale + shift, i) ? other : chosen;
          }
          const int64_t at = (column + q) * channels_ + channel;
          store_rectified(maximum, p.y + y_.row(n, row) + at, state.choice + dense + at);
          store(state.x_hat + dense + at, chosen * rstd);
        }
      }
    }
  }

  // sums += patches · w for two rows of 2Q pixels.
  template <int V, int Q>
  void convolve(const T* x, const T* w, Vector<T> (&sums)[4 * Q][V]) const {
    for (int64_t segment = 0; segment < segments_; ++segment, x += x_.row_pitch()) {
      const T *upper = x, *lower = x + x_.row_pitch();
      for (int64_t k = 0; k < segment_; ++k, w += channels_) {
        Vector<T> weights[V];
        INNERLOOP_UNROLL
        for (int v = 0; v < V; ++v) weights[v] = load(w + v * L);
        INNERLOOP_UNROLL
        for (int i = 0; i < 2 * Q; ++i) {
          const Vector<T> above = broadcast(upper[i * x_.stride + k]), below = broadcast(lower[i * x_.stride + k]);
          INNERLOOP_UNROLL
          for (int v = 0; v < V; ++v) {
            sums[i][v] += above * weights[v];
            sums[2 * Q + i][v] += below * weights[v];
          }
        }
      }
    }
  }

  ChosenShape chosen_shape() const { return {y_.shape.height, y_.shape.width, channels_, x_.stride, x_.row_pitch()}; }

  // D += Σ x_p dŷ_p and sums_ += Σ dŷ.
  void add_chosen(const Primal<T>& p, const State& state, const T* dy, T* D) {
    for (int64_t n = 0; n < p.samples; ++n) {
      const Index<T>* choice = state.choice + n * y_.dense_size();
      const T* image_dy = dy + n * y_.dense_size();
      if constexpr (has_table_lookup && sizeof(T) == 4) {
        if (looks_up_) {
          add_chosen_patches(chosen_shape(), patch_at(p.x[0], n, 0), choice, image_dy, D, sums_);
          continue;
        }
      }
      spread(choice, image_dy);
      convolution_.add_weight_gradient(1, p.x[0] + n * x_.sample_size(), image_, D, nullptr);
    }
  }

  // image_ = dŷ with the halo of a gradient; sums_ += Σ dŷ.
  void spread(const Index<T>* choice, const T* dy) {
    const int64_t halo = convolution_.gradient_halo();
    std::fill_n(image_, (convolution_.output_height() + 2 * halo) * dz_row_, T(0));
    for (int64_t row = 0; row < y_.shape.height; ++row) {
      T* to = image_ + (2 * row + halo) * dz_row_ + halo * channels_;
      for (int64_t column = 0; column < y_.shape.width; ++column, to += 2 * channels_) {
        for (int64_t c = 0; c < channels_; c += L, choice += L, dy += L) {
          const IndexVector<T> chosen = load_indices<T>(choice);
          const Vector<T> value = where<T>(chosen >= 0, load(dy));
          store(sums_ + c, load(sums_ + c) + value);
          for (int i = 0; i < 4; ++i) store(to + i / 2 * dz_row_ + i % 2 * channels_ + c, where<T>(chosen == i, value));
        }
      }
    }
  }

  // z_tangent_ = ż of the chosen elements of a row of outputs; without tables, image_ holds ż of the image.
  void chosen_z_tangent(const T* x, int64_t n, int64_t row, const Index<T>* choice, const T* w_dot) const {
    if constexpr (has_table_lookup && sizeof(T) == 4) {
      if (looks_up_) return multiply_chosen_patches(chosen_shape(), patch_at(x, n, row), choice, w_dot, z_tangent_);
    }
    for (int64_t column = 0; column < y_.shape.width; ++column) {
      for (int64_t c = 0; c < channels_; c += L) {
        const int64_t at = column * channels_ + c;
        const IndexVector<T> chosen = load_indices<T>(choice + at);
        const T* z = image_ + 2 * row * z_row_ + 2 * column * channels_ + c;
        Vector<T> value = load(z);
        for (int i = 1; i < 4; ++i) value = chosen == i ? load(z + i / 2 * z_row_ + i % 2 * channels_) : value;
        store(z_tangent_ + at, value);
      }
    }
  }

  const double eps_;
  const ValueLayout x_, y_;
  const int64_t channels_;
  const Convolution<T> convolution_;
  const int64_t segments_, segment_, patch_;         // a patch: kernel rows, elements of one, elements
  const int64_t origin_, z_row_, dz_row_;            // first patch of an image in x; rows of z and of its gradient
  const bool looks_up_;                              // by kernels/chosen_patches.h
  const int64_t weight_, conv_bias_, gamma_, beta_;  // offsets in packed arrays, −1: none
  T *ones_, *zeros_, *start_, *sums_, *D_tangent_, *z_tangent_;
  T* image_;                    // one image of z or of its gradient
  PatchMoments<T> moments_[2];  // by side
  bool has_moments_[2] = {};    // of the task at hand
  std::vector<double> covariance_w_, covariance_w_dot_;
};

}  // namespace

bool is_first_block(const BlockNodes& nodes, const std::vector<ValueLayout>& values) {
  const Window& window = nodes.conv->window;
  return nodes.conv->inputs[0] == 0 && nodes.pool && window.stride_height == 1 && window.stride_width == 1 &&
         window.kernel_height * window.kernel_width * values[0].stride <= largest_patch;
}

template <class T>
std::unique_ptr<Layer<T>> make_first_block(const BlockNodes& nodes, const LayerContext<T>& context) {
  return std::make_unique<FirstBlock<T>>(nodes, context);
}

template std::unique_ptr<Layer<float>> make_first_block(const BlockNodes&, const LayerContext<float>&);
template std::unique_ptr<Layer<double>> make_first_block(const BlockNodes&, const LayerContext<double>&);

}  // namespace innerloop::INNERLOOP_ISA
