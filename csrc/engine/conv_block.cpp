// y = pool(relu(γ x̂ + β)), x̂ = (z − m) r, z = x ∗ W + b, with m and r = 1/√(var + ε) of the pass at hand.
//
// The formulas are those of batch_norm.cpp and conv2d.cpp, with the same symbols; what is gained is memory traffic. z
// is written once and read while a group of images is in the cache; the large gradient of z exists for one group at a
// time. Of a pooling window one element takes the gradient: `choice` says which, so dy is never spread over the window.
//
// The mean takes b away: b has no gradient, and its direction moves nothing.
#include "engine/conv_block.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "engine/block_vectors.h"
#include "engine/convolution_shape.h"

namespace innerloop::INNERLOOP_ISA {
namespace {

// Mean and variance of every channel over groups of pixels: each group's in two passes while it is in the cache, merged
// in double (Chan, Golub & LeVeque).
template <class T>
class ChannelMoments {
 public:
  explicit ChannelMoments(int64_t channels)
      : channels_(channels), mean_(static_cast<size_t>(channels)), squares_(static_cast<size_t>(channels)) {}

  void start() {
    std::ranges::fill(mean_, 0.0);
    std::ranges::fill(squares_, 0.0);
    count_ = 0;
  }

  void add(const T* z, int64_t pixels) {
    constexpr int L = lanes<T>;
    for (int64_t c = 0; c < channels_; c += L) {
      const Vector<T> mean = sum_over(z + c, pixels, [](Vector<T> v) { return v; }) * (1 / static_cast<T>(pixels));
      const Vector<T> squares = sum_over(z + c, pixels, [&](Vector<T> v) { return (v - mean) * (v - mean); });
      const double n = static_cast<double>(pixels), total = count_ + n;
      for (int i = 0; i < L; ++i) {
        const size_t channel = static_cast<size_t>(c + i);
        const double difference = static_cast<double>(mean[i]) - mean_[channel];
        squares_[channel] += static_cast<double>(squares[i]) + difference * difference * count_ * n / total;
        mean_[channel] += difference * n / total;
      }
    }
    count_ += static_cast<double>(pixels);
  }

  double mean(int64_t channel) const { return mean_[static_cast<size_t>(channel)]; }
  double variance(int64_t channel) const { return squares_[static_cast<size_t>(channel)] / count_; }

 private:
  template <class Function>
  Vector<T> sum_over(const T* z, int64_t pixels, Function function) const {
    Vector<T> sums[4] = {};  // four, so that additions need not wait for one another
    int64_t p = 0;
    for (; p + 4 <= pixels; p += 4) {
      INNERLOOP_UNROLL
      for (int i = 0; i < 4; ++i) sums[i] += function(load(z + (p + i) * channels_));
    }
    for (; p < pixels; ++p) sums[0] += function(load(z + p * channels_));
    return (sums[0] + sums[1]) + (sums[2] + sums[3]);
  }

  int64_t channels_;
  double count_ = 0;
  std::vector<double> mean_, squares_;
};

// Pool: the edge of the pooling window, 2 or 1 (no pooling).
template <class T, int Pool>
class ConvBlock final : public Layer<T> {
  static constexpr int L = lanes<T>;

  // What a pass leaves: m, r, B, G by channel, z, and a choice for every output.
  struct State {
    T *mean, *rstd, *B, *G, *z;
    Index<T>* choice;
  };
  // Along a direction: ṁ, s by channel, and ż.
  struct TangentState {
    T *mean, *s, *z;
  };

 public:
  ConvBlock(const BlockNodes& nodes, const LayerContext<T>& context)
      : eps_(nodes.norm->number),
        x_(context.value(nodes.conv->inputs[0])),
        y_(context.value((nodes.pool ? nodes.pool : nodes.relu)->output)),
        channels_(y_.stride),
        convolution_(convolution_shape(nodes.conv->window, x_, channels_, 0),
                     winograd_use(context.request.paths.winograd)),
        height_(convolution_.output_height()),
        width_(convolution_.output_width()),
        group_(std::min(convolution_.group(), context.max_samples)),
        halo_(convolution_.gradient_halo()),
        z_row_(width_ * channels_),
        z_image_(height_ * z_row_),
        dz_row_((width_ + 2 * halo_) * channels_),
        dz_image_((height_ + 2 * halo_) * dz_row_),
        weight_(context.offset(nodes.conv->weight)),
        conv_bias_(context.offset(nodes.conv->bias)),
        gamma_(context.offset(nodes.norm->weight)),
        beta_(context.offset(nodes.norm->bias)),
        ones_(context.memory.take(channels_)),
        zeros_(context.memory.take(channels_)),
        B_tangent_(context.memory.take(channels_)),
        G_tangent_(context.memory.take(channels_)),
        prepared_(context.scratch.weights.reserve(convolution_.prepared_size())),
        prepared_direction_(context.scratch.direction.reserve(convolution_.prepared_size())),
        scratch_(context.scratch.products.reserve(convolution_.scratch_size())),
        dz_(context.memory.take(group_ * dz_image_)),
        dz_tangent_(context.memory.take(group_ * dz_image_)),
        moments_(channels_) {
    std::fill_n(ones_, channels_, T(1));
  }

  int64_t state_size(int64_t samples) const override { return 4 * channels_ + samples * (z_image_ + y_.dense_size()); }
  int64_t tangent_state_size(int64_t samples) const override { return 2 * channels_ + samples * z_image_; }

  void forward(const T* theta, const Primal<T>& p) override {
    const State state = state_of(p);
    const T* w = convolution_.prepare_forward(theta + weight_, prepared_.data());
    moments_.start();
    for_groups(p.samples, [&](int64_t n, int64_t images) {
      T* z = state.z + n * z_image_;
      convolution_.forward(images, x_of(p.x[0], n), w, conv_bias_ < 0 ? nullptr : theta + conv_bias_, z,
                           scratch_.data());
      moments_.add(z, images * height_ * width_);
    });
    for (int64_t c = 0; c < channels_; ++c) {
      state.mean[c] = static_cast<T>(moments_.mean(c));
      // 0 in the padding, which must stay finite whatever ε is.
      state.rstd[c] = c < y_.shape.channels ? static_cast<T>(1 / std::sqrt(moments_.variance(c) + eps_)) : T(0);
    }
    const T *gamma = gamma_of(theta), *beta = beta_of(theta);
    for_rows(p.samples, [&](int64_t n, int64_t row, int64_t c) {
      const Vector<T> scale = load(state.rstd + c) * load(gamma + c);
      const Vector<T> shift = load(beta + c) - load(state.mean + c) * scale;
      const T* z = state.z + z_at(n, row) + c;
      T* y = p.y + y_.row(n, row) + c;
      Index<T>* choice = state.choice + dense_at(n, row) + c;
      for (int64_t column = 0; column < y_.dense_row(); column += channels_, z += Pool * channels_) {
        Maximum<T> maximum(load(z) * scale + shift);
        INNERLOOP_UNROLL
        for (int i = 1; i < Pool * Pool; ++i) maximum.offer(load(z + window(i)) * scale + shift, i);
        store_rectified(maximum, y + column, choice + column);
      }
    });
  }

  void backward(const T* theta, const Primal<T>& p, T* gradient) override {
    const State state = state_of(p);
    const T* gamma = gamma_of(theta);
    // B = Σ dŷ/n and G = Σ dŷ x̂/n, where dŷ is dy at the chosen element and 0 elsewhere
    const double n_pixels = pixels(p.samples);
    for (int64_t c = 0; c < channels_; c += L) {
      const Vector<T> mean = load(state.mean + c), rstd = load(state.rstd + c);
      DoubleSum<T> beta_sum, gamma_sum;
      for_rows_of_channel(p.samples, [&](int64_t n, int64_t row) {
        const T* z = state.z + z_at(n, row) + c;
        const int64_t at = dense_at(n, row) + c;
        Vector<T> sum{}, sum_x{};
        for (int64_t column = 0; column < y_.dense_row(); column += channels_, z += Pool * channels_) {
          const IndexVector<T> choice = load_indices<T>(state.choice + at + column);
          const Vector<T> dy = where<T>(choice >= 0, load(p.dy + at + column));
          sum += dy;
          sum_x += dy * ((chosen(z, choice) - mean) * rstd);
        }
        beta_sum.add(sum);
        gamma_sum.add(sum_x);
      });
      add_sums(gradient, c, beta_sum, gamma_sum);
      store(state.B + c, beta_sum.scaled(1 / n_pixels));
      store(state.G + c, gamma_sum.scaled(1 / n_pixels));
    }

    const T* w = p.dx[0] ? convolution_.prepare_input_gradient(theta + weight_, prepared_.data()) : nullptr;
    if (gradient) convolution_.start_weight_gradient(scratch_.data());
    for_groups(p.samples, [&](int64_t n, int64_t images) {
      gradient_of_z(state, gamma, p.dy, n, images);
      if (gradient) {
        convolution_.add_weight_gradient(images, x_of(p.x[0], n), dz_, gradient + weight_, scratch_.data());
      }
      if (p.dx[0]) convolution_.input_gradient(images, {{dz_, w}}, p.dx[0] + n * x_.dense_size(), scratch_.data());
    });
    if (gradient) convolution_.finish_weight_gradient(gradient + weight_, scratch_.data());
  }

  void forward_tangent(const T* theta, const T* direction, const Primal<T>& p, const Tangent<T>& t) override {
    const State state = state_of(p);
    const TangentState tangent = tangent_of(t);
    const T* w = t.x[0] ? convolution_.prepare_tangent(theta + weight_, prepared_.data()) : nullptr;
    const T* w_tangent =
        direction ? convolution_.prepare_tangent(direction + weight_, prepared_direction_.data()) : nullptr;
    std::vector<DoubleSum<T>> sums(static_cast<size_t>(channels_ / L)), sums_x(sums);
    for_groups(p.samples, [&](int64_t n, int64_t images) {
      const Term<T> along_w = direction ? Term<T>{x_of(p.x[0], n), w_tangent} : Term<T>{};
      const Term<T> along_x = t.x[0] ? Term<T>{x_of(t.x[0], n), w} : Term<T>{};
      const T* z = state.z + n * z_image_;
      T* z_tangent = tangent.z + n * z_image_;
      convolution_.tangent(images, direction ? Terms<T>{along_w, along_x} : Terms<T>{along_x}, nullptr, z_tangent,
                           scratch_.data());
      for (int64_t c = 0; c < channels_; c += L) {
        const Vector<T> mean = load(state.mean + c), rstd = load(state.rstd + c);
        for (int64_t image = 0; image < images; ++image) {
          Vector<T> sum{}, sum_x{};
          for (int64_t at = image * z_image_ + c; at < (image + 1) * z_image_; at += channels_) {
            const Vector<T> along = load(z_tangent + at);
            sum += along;
            sum_x += along * ((load(z + at) - mean) * rstd);
          }
          sums[static_cast<size_t>(c / L)].add(sum);
          sums_x[static_cast<size_t>(c / L)].add(sum_x);
        }
      }
    });
    const double n_pixels = pixels(p.samples);
    for (int64_t c = 0; c < channels_; c += L) {
      store(tangent.mean + c, sums[static_cast<size_t>(c / L)].scaled(1 / n_pixels));
      store(tangent.s + c, sums_x[static_cast<size_t>(c / L)].scaled(1 / n_pixels));
    }

    const T *gamma = gamma_of(theta), *gamma_dot = direction_of(direction, gamma_),
            *beta_dot = direction_of(direction, beta_);
    for_rows(p.samples, [&](int64_t n, int64_t row, int64_t c) {
      const Normalised x_hat(state, tangent, c);
      const Vector<T> scale = load(gamma + c), scale_dot = load(gamma_dot + c), shift_dot = load(beta_dot + c);
      const T *z = state.z + z_at(n, row) + c, *z_tangent = tangent.z + z_at(n, row) + c;
      T* y = t.y + y_.row(n, row) + c;
      const Index<T>* choices = state.choice + dense_at(n, row) + c;
      for (int64_t column = 0; column < y_.dense_row(); column += channels_) {
        const IndexVector<T> choice = load_indices<T>(choices + column);
        const Vector<T> value = x_hat.value(chosen(z + Pool * column, choice));
        const Vector<T> along = x_hat.tangent(value, chosen(z_tangent + Pool * column, choice));
        store(y + column, where<T>(choice >= 0, scale_dot * value + scale * along + shift_dot));
      }
    });
  }

  void backward_tangent(const T* theta, const T* direction, const Primal<T>& p, const Tangent<T>& t,
                        T* product) override {
    const State state = state_of(p);
    const TangentState tangent = tangent_of(t);
    // Ḃ = Σ dŷ˙/n and Ġ = Σ (dŷ˙ x̂ + dŷ x̂′)/n
    const double n_pixels = pixels(p.samples);
    for (int64_t c = 0; c < channels_; c += L) {
      const Normalised x_hat(state, tangent, c);
      DoubleSum<T> beta_sum, gamma_sum;
      for_rows_of_channel(p.samples, [&](int64_t n, int64_t row) {
        const T *z = state.z + z_at(n, row) + c, *z_tangent = tangent.z + z_at(n, row) + c;
        const int64_t at = dense_at(n, row) + c;
        Vector<T> sum{}, sum_x{};
        for (int64_t column = 0; column < y_.dense_row(); column += channels_) {
          const IndexVector<T> choice = load_indices<T>(state.choice + at + column);
          const Vector<T> dy = where<T>(choice >= 0, load(p.dy + at + column));
          const Vector<T> dy_tangent = where<T>(choice >= 0, load(t.dy + at + column));
          const Vector<T> value = x_hat.value(chosen(z + Pool * column, choice));
          sum += dy_tangent;
          sum_x += dy_tangent * value + dy * x_hat.tangent(value, chosen(z_tangent + Pool * column, choice));
        }
        beta_sum.add(sum);
        gamma_sum.add(sum_x);
      });
      add_sums(product, c, beta_sum, gamma_sum);
      store(B_tangent_ + c, beta_sum.scaled(1 / n_pixels));
      store(G_tangent_ + c, gamma_sum.scaled(1 / n_pixels));
    }

    const bool two_products = t.dx[0] && direction;
    const T* w = t.dx[0] ? convolution_.prepare_input_gradient(theta + weight_, prepared_.data()) : nullptr;
    const T* w_tangent =
        two_products ? convolution_.prepare_input_gradient(direction + weight_, prepared_direction_.data()) : nullptr;
    const T *gamma = gamma_of(theta), *gamma_dot = direction_of(direction, gamma_);
    if (product) convolution_.start_weight_gradient(scratch_.data());
    for_groups(p.samples, [&](int64_t n, int64_t images) {
      tangent_gradient_of_z(state, tangent, gamma, gamma_dot, p.dy, t.dy, n, images);
      if (product) {
        convolution_.add_weight_gradient(images, x_of(p.x[0], n), dz_tangent_, product + weight_, scratch_.data());
        if (t.x[0]) convolution_.add_weight_gradient(images, x_of(t.x[0], n), dz_, product + weight_, scratch_.data());
      }
      if (t.dx[0]) {
        const Term<T> along_w = two_products ? Term<T>{dz_, w_tangent} : Term<T>{};
        convolution_.input_gradient(images, {{dz_tangent_, w}, along_w}, t.dx[0] + n * x_.dense_size(),
                                    scratch_.data());
      }
    });
    if (product) convolution_.finish_weight_gradient(product + weight_, scratch_.data());
  }

 private:
  // x̂ of a channel, and x̂′ = r (ż − ṁ − s x̂).
  struct Normalised {
    Normalised(const State& state, const TangentState& tangent, int64_t c)
        : mean(load(state.mean + c)),
          rstd(load(state.rstd + c)),
          mean_dot(load(tangent.mean + c)),
          s(load(tangent.s + c)) {}
    Vector<T> value(Vector<T> z) const { return (z - mean) * rstd; }
    Vector<T> tangent(Vector<T> x_hat, Vector<T> z_dot) const { return rstd * (z_dot - mean_dot - s * x_hat); }
    Vector<T> mean, rstd, mean_dot, s;
  };

  State state_of(const Primal<T>& p) const {
    T* z = p.state + 4 * channels_;
    return {p.state,
            p.state + channels_,
            p.state + 2 * channels_,
            p.state + 3 * channels_,
            z,
            reinterpret_cast<Index<T>*>(z + p.samples * z_image_)};
  }
  TangentState tangent_of(const Tangent<T>& t) const { return {t.state, t.state + channels_, t.state + 2 * channels_}; }

  const T* gamma_of(const T* theta) const { return gamma_ < 0 ? ones_ : theta + gamma_; }
  const T* beta_of(const T* theta) const { return beta_ < 0 ? zeros_ : theta + beta_; }
  const T* direction_of(const T* direction, int64_t offset) const {
    return direction && offset >= 0 ? direction + offset : zeros_;
  }
  const T* x_of(const T* x, int64_t n) const { return x + n * x_.sample_size(); }
  double pixels(int64_t samples) const { return static_cast<double>(samples * height_ * width_); }

  // Offsets of what belongs to a row of outputs.
  int64_t z_at(int64_t n, int64_t row) const { return n * z_image_ + row * Pool * z_row_; }
  int64_t dense_at(int64_t n, int64_t row) const { return n * y_.dense_size() + row * y_.dense_row(); }
  // Offset of an element of a pooling window.
  int64_t window(int i) const { return (i / Pool) * z_row_ + (i % Pool) * channels_; }

  // The chosen element of the window at z; that of −1 is any.
  Vector<T> chosen(const T* z, IndexVector<T> choice) const {
    Vector<T> value = load(z);
    INNERLOOP_UNROLL
    for (int i = 1; i < Pool * Pool; ++i) value = choice == i ? load(z + window(i)) : value;
    return value;
  }

  template <class Visit>
  void for_groups(int64_t samples, const Visit& visit) const {
    for (int64_t n = 0; n < samples; n += group_) visit(n, std::min(group_, samples - n));
  }

  // Calls visit(sample, row of outputs, first channel of a vector).
  template <class Visit>
  void for_rows(int64_t samples, const Visit& visit) const {
    for (int64_t n = 0; n < samples; ++n) {
      for (int64_t row = 0; row < y_.shape.height; ++row) {
        for (int64_t c = 0; c < channels_; c += L) visit(n, row, c);
      }
    }
  }

  template <class Visit>
  void for_rows_of_channel(int64_t samples, const Visit& visit) const {
    for (int64_t n = 0; n < samples; ++n) {
      for (int64_t row = 0; row < y_.shape.height; ++row) visit(n, row);
    }
  }

  void add_sums(T* gradient, int64_t c, const DoubleSum<T>& beta_sum, const DoubleSum<T>& gamma_sum) const {
    if (!gradient) return;
    if (beta_ >= 0) store(gradient + beta_ + c, load(gradient + beta_ + c) + beta_sum.scaled(1));
    if (gamma_ >= 0) store(gradient + gamma_ + c, load(gradient + gamma_ + c) + gamma_sum.scaled(1));
  }

  // Calls visit(offset in z, offset in dz, channel, whether outputs stand there, offset of their row in dense
  // gradients, position in the window of the row's first element) for every row of z of a group.
  template <class Visit>
  void for_rows_of_z(int64_t first, int64_t images, const Visit& visit) const {
    for (int64_t n = 0; n < images; ++n) {
      for (int64_t row = 0; row < height_; ++row) {
        const int64_t z = (first + n) * z_image_ + row * z_row_;
        const int64_t dz = n * dz_image_ + (row + halo_) * dz_row_ + halo_ * channels_;
        const bool pooled = row / Pool < y_.shape.height;
        for (int64_t c = 0; c < channels_; c += L) {
          visit(z + c, dz + c, c, pooled ? y_.shape.width : 0, dense_at(first + n, row / Pool) + c,
                static_cast<int>(row % Pool) * Pool);
        }
      }
    }
  }

  // dz_ = γ r (dŷ − B − x̂ G) for a group of images.
  void gradient_of_z(const State& state, const T* gamma, const T* dy, int64_t first, int64_t images) {
    for_rows_of_z(first, images, [&](int64_t z, int64_t dz, int64_t c, int64_t outputs, int64_t dense, int position) {
      const Vector<T> rstd = load(state.rstd + c), scale = load(gamma + c) * rstd, slope = load(state.G + c) * rstd;
      const Vector<T> constant = load(state.mean + c) * slope - load(state.B + c);  // −B − x̂ G is constant − z slope
      const T* from = state.z + z;
      T* to = dz_ + dz;
      for (int64_t output = 0; output < outputs; ++output) {
        const IndexVector<T> choice = load_indices<T>(state.choice + dense + output * channels_);
        const Vector<T> arriving = load(dy + dense + output * channels_);
        INNERLOOP_UNROLL
        for (int i = 0; i < Pool; ++i, from += channels_, to += channels_) {
          store(to, scale * (constant - load(from) * slope + where<T>(choice == position + i, arriving)));
        }
      }
      for (int64_t column = outputs * Pool; column < width_; ++column, from += channels_, to += channels_) {
        store(to, scale * (constant - load(from) * slope));
      }
    });
  }

  // dz_ as above, and dz_tangent_ = (γ̇ r − γ r² s) A + γ r Ȧ.
  void tangent_gradient_of_z(const State& state, const TangentState& tangent, const T* gamma, const T* gamma_dot,
                             const T* dy, const T* dy_tangent, int64_t first, int64_t images) {
    for_rows_of_z(first, images, [&](int64_t z, int64_t dz, int64_t c, int64_t outputs, int64_t dense, int position) {
      const Normalised x_hat(state, tangent, c);
      const Vector<T> scale = load(gamma + c) * x_hat.rstd;
      const Vector<T> scale_dot = (load(gamma_dot + c) - scale * x_hat.s) * x_hat.rstd;
      const Vector<T> B = load(state.B + c), G = load(state.G + c);
      const Vector<T> B_dot = load(B_tangent_ + c), G_dot = load(G_tangent_ + c);
      const auto element = [&](int64_t at, Vector<T> arriving, Vector<T> arriving_dot) {
        const Vector<T> value = x_hat.value(load(state.z + z + at));
        const Vector<T> along = x_hat.tangent(value, load(tangent.z + z + at));
        const Vector<T> a = arriving - B - value * G;
        const Vector<T> a_dot = arriving_dot - B_dot - along * G - value * G_dot;
        store(dz_ + dz + at, scale * a);
        store(dz_tangent_ + dz + at, scale_dot * a + scale * a_dot);
      };
      for (int64_t output = 0; output < outputs; ++output) {
        const int64_t at = dense + output * channels_;
        const IndexVector<T> choice = load_indices<T>(state.choice + at);
        const Vector<T> arriving = load(dy + at), arriving_dot = load(dy_tangent + at);
        INNERLOOP_UNROLL
        for (int i = 0; i < Pool; ++i) {
          const IndexVector<T> here = choice == position + i;
          element((output * Pool + i) * channels_, where<T>(here, arriving), where<T>(here, arriving_dot));
        }
      }
      for (int64_t column = outputs * Pool; column < width_; ++column) {
        element(column * channels_, Vector<T>{}, Vector<T>{});
      }
    });
  }

  const double eps_;
  const ValueLayout x_, y_;
  const int64_t channels_;
  const Convolution<T> convolution_;
  const int64_t height_, width_, group_, halo_;  // of z; images a group; halo of its gradient
  const int64_t z_row_, z_image_, dz_row_, dz_image_;
  const int64_t weight_, conv_bias_, gamma_, beta_;  // offsets in packed arrays, −1: none
  T *ones_, *zeros_, *B_tangent_, *G_tangent_;
  Scratch<T>&prepared_, &prepared_direction_, &scratch_;
  T *dz_, *dz_tangent_;  // gradients of a group's z; their halo stays 0
  ChannelMoments<T> moments_;
};

}  // namespace

template <class T>
std::unique_ptr<Layer<T>> make_conv_block(const BlockNodes& nodes, const LayerContext<T>& context) {
  if (nodes.pool) return std::make_unique<ConvBlock<T, 2>>(nodes, context);
  return std::make_unique<ConvBlock<T, 1>>(nodes, context);
}

template std::unique_ptr<Layer<float>> make_conv_block(const BlockNodes&, const LayerContext<float>&);
template std::unique_ptr<Layer<double>> make_conv_block(const BlockNodes&, const LayerContext<double>&);

}  // namespace innerloop::INNERLOOP_ISA
