// y = x ∗ W + b, W packed as [kernel rows][kernel columns][inputs][outputs].
#include <algorithm>

#include "engine/convolution_shape.h"
#include "engine/layers.h"

namespace innerloop::INNERLOOP_ISA {
namespace {

template <class T>
class Conv2d final : public Layer<T> {
 public:
  Conv2d(const Node& node, const LayerContext<T>& context)
      : x_(context.value(node.inputs[0])),
        y_(context.value(node.output)),
        convolution_(convolution_shape(node.window, x_, y_.stride, y_.halo),
                     winograd_use(context.request.paths.winograd)),
        group_(std::min(convolution_.group(), context.max_samples)),
        halo_(convolution_.gradient_halo()),
        dy_image_((y_.shape.height + 2 * halo_) * (y_.shape.width + 2 * halo_) * y_.stride),
        weight_(context.offset(node.weight)),
        bias_(context.offset(node.bias)),
        prepared_(context.scratch.weights.reserve(convolution_.prepared_size())),
        prepared_direction_(context.scratch.direction.reserve(convolution_.prepared_size())),
        scratch_(context.scratch.products.reserve(convolution_.scratch_size())),
        dy_(context.memory.take(group_ * dy_image_)),
        dy_tangent_(context.memory.take(group_ * dy_image_)) {}

  void forward(const T* theta, const Primal<T>& p) override {
    const T* w = convolution_.prepare_forward(theta + weight_, prepared_.data());
    for_groups(p.samples, [&](int64_t n, int64_t images) {
      convolution_.forward(images, p.x[0] + n * x_.sample_size(), w, bias_of(theta), p.y + n * y_.sample_size(),
                           scratch_.data());
    });
  }

  void backward(const T* theta, const Primal<T>& p, T* gradient) override {
    const T* w = p.dx[0] ? convolution_.prepare_input_gradient(theta + weight_, prepared_.data()) : nullptr;
    if (gradient) convolution_.start_weight_gradient(scratch_.data());
    for_groups(p.samples, [&](int64_t n, int64_t images) {
      const T* dy = with_halo(p.dy, n, images, dy_);
      if (gradient) add_weight_gradient(p.x[0], dy, n, images, gradient);
      if (p.dx[0]) convolution_.input_gradient(images, {{dy, w}}, p.dx[0] + n * x_.dense_size(), scratch_.data());
    });
    if (!gradient) return;
    convolution_.finish_weight_gradient(gradient + weight_, scratch_.data());
    add_bias_gradient(p.samples, p.dy, gradient);
  }

  // ẏ = x ∗ Ẇ + ẋ ∗ W + ḃ
  void forward_tangent(const T* theta, const T* direction, const Primal<T>& p, const Tangent<T>& t) override {
    const T* w = t.x[0] ? convolution_.prepare_tangent(theta + weight_, prepared_.data()) : nullptr;
    const T* w_tangent =
        direction ? convolution_.prepare_tangent(direction + weight_, prepared_direction_.data()) : nullptr;
    for_groups(p.samples, [&](int64_t n, int64_t images) {
      const int64_t x = n * x_.sample_size();
      const Term<T> along_w = direction ? Term<T>{p.x[0] + x, w_tangent} : Term<T>{};
      const Term<T> along_x = t.x[0] ? Term<T>{t.x[0] + x, w} : Term<T>{};
      const Terms<T> terms = direction ? Terms<T>{along_w, along_x} : Terms<T>{along_x};
      convolution_.tangent(images, terms, direction ? bias_of(direction) : nullptr, t.y + n * y_.sample_size(),
                           scratch_.data());
    });
  }

  // dẋ and dẆ are sums of the two products that backward's become
  void backward_tangent(const T* theta, const T* direction, const Primal<T>& p, const Tangent<T>& t,
                        T* product) override {
    const T* w = t.dx[0] ? convolution_.prepare_input_gradient(theta + weight_, prepared_.data()) : nullptr;
    const T* w_tangent = t.dx[0] && direction
                             ? convolution_.prepare_input_gradient(direction + weight_, prepared_direction_.data())
                             : nullptr;
    if (product) convolution_.start_weight_gradient(scratch_.data());
    for_groups(p.samples, [&](int64_t n, int64_t images) {
      const T* dy = with_halo(p.dy, n, images, dy_);
      const T* dy_tangent = with_halo(t.dy, n, images, dy_tangent_);
      if (product) {
        add_weight_gradient(p.x[0], dy_tangent, n, images, product);
        if (t.x[0]) add_weight_gradient(t.x[0], dy, n, images, product);
      }
      if (t.dx[0]) {
        const Term<T> along_w = w_tangent ? Term<T>{dy, w_tangent} : Term<T>{};
        convolution_.input_gradient(images, {{dy_tangent, w}, along_w}, t.dx[0] + n * x_.dense_size(), scratch_.data());
      }
    });
    if (!product) return;
    convolution_.finish_weight_gradient(product + weight_, scratch_.data());
    add_bias_gradient(p.samples, t.dy, product);
  }

 private:
  const T* bias_of(const T* packed) const { return bias_ < 0 ? nullptr : packed + bias_; }

  // Calls visit(first image, images) for groups that stay in the cache.
  template <class Visit>
  void for_groups(int64_t samples, const Visit& visit) const {
    for (int64_t n = 0; n < samples; n += group_) visit(n, std::min(group_, samples - n));
  }

  // Copies images of a dense gradient into memory with the halo that the convolution wants; the halo stays 0.
  const T* with_halo(const T* dense, int64_t first, int64_t images, T* to) const {
    const int64_t row = y_.dense_row(), pitch = row + 2 * halo_ * y_.stride;
    const T* from = dense + first * y_.dense_size();
    for (int64_t n = 0; n < images; ++n) {
      for (int64_t h = 0; h < y_.shape.height; ++h, from += row) {
        std::copy_n(from, row, to + n * dy_image_ + (h + halo_) * pitch + halo_ * y_.stride);
      }
    }
    return to;
  }

  void add_weight_gradient(const T* x, const T* dy, int64_t n, int64_t images, T* gradient) const {
    convolution_.add_weight_gradient(images, x + n * x_.sample_size(), dy, gradient + weight_, scratch_.data());
  }

  void add_bias_gradient(int64_t samples, const T* dy, T* gradient) const {
    if (bias_ >= 0) add_column_sums(samples * y_.pixels(), y_.stride, dy, y_.stride, gradient + bias_);
  }

  const ValueLayout x_, y_;
  const Convolution<T> convolution_;
  const int64_t group_, halo_, dy_image_, weight_, bias_;
  Scratch<T>&prepared_, &prepared_direction_, &scratch_;
  T *dy_, *dy_tangent_;
};

}  // namespace

template <class T>
std::unique_ptr<Layer<T>> make_conv2d(const Node& node, const LayerContext<T>& context) {
  return std::make_unique<Conv2d<T>>(node, context);
}

template std::unique_ptr<Layer<float>> make_conv2d(const Node&, const LayerContext<float>&);
template std::unique_ptr<Layer<double>> make_conv2d(const Node&, const LayerContext<double>&);

}  // namespace innerloop::INNERLOOP_ISA
