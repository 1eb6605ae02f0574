// y = x·W + b, W packed as [inputs][outputs].
#include "engine/layers.h"
#include "kernels/gemm.h"

namespace innerloop::INNERLOOP_ISA {
namespace {

template <class T>
class Linear final : public Layer<T> {
 public:
  Linear(const Node& node, const LayerContext<T>& context)
      : inputs_(context.value(node.inputs[0]).shape.channels),
        x_row_(context.value(node.inputs[0]).stride),
        y_row_(context.value(node.output).stride),
        weight_(context.offset(node.weight)),
        bias_(context.offset(node.bias)),
        transposed_(context.memory.take(y_row_ * x_row_)),
        transposed_direction_(context.memory.take(y_row_ * x_row_)) {}

  void forward(const T* theta, const Primal<T>& p) override {
    multiply<T>(products(p.samples), {{p.x[0], theta + weight_}}, bias_of(theta), p.y);
  }

  // dx = dy·Wᵀ, dW = xᵀ·dy, db = Σ dy
  void backward(const T* theta, const Primal<T>& p, T* gradient) override {
    if (p.dx[0]) {
      multiply<T>(transposed_products(p.samples), {{p.dy, transpose_of(theta, transposed_)}}, nullptr, p.dx[0]);
    }
    if (gradient) add_weight_gradient(p.samples, p.x[0], p.dy, gradient, true);
  }

  // ẏ = x·Ẇ + ẋ·W + ḃ
  void forward_tangent(const T* theta, const T* direction, const Primal<T>& p, const Tangent<T>& t) override {
    const Term<T> along_x{t.x[0], theta + weight_};
    if (direction) {
      multiply<T>(products(p.samples), {{p.x[0], direction + weight_}, t.x[0] ? along_x : Term<T>{}},
                  bias_of(direction), t.y);
    } else {
      multiply<T>(products(p.samples), {along_x}, nullptr, t.y);
    }
  }

  // dẋ = dẏ·Wᵀ + dy·Ẇᵀ, dẆ = xᵀ·dẏ + ẋᵀ·dy
  void backward_tangent(const T* theta, const T* direction, const Primal<T>& p, const Tangent<T>& t,
                        T* product) override {
    if (t.dx[0]) {
      const Term<T> along_dy{t.dy, transpose_of(theta, transposed_)};
      const Term<T> along_weight =
          direction ? Term<T>{p.dy, transpose_of(direction, transposed_direction_)} : Term<T>{};
      multiply<T>(transposed_products(p.samples), {along_dy, along_weight}, nullptr, t.dx[0]);
    }
    if (!product) return;
    add_weight_gradient(p.samples, p.x[0], t.dy, product, true);
    if (t.x[0]) add_weight_gradient(p.samples, t.x[0], p.dy, product, false);
  }

 private:
  const T* bias_of(const T* packed) const { return bias_ < 0 ? nullptr : packed + bias_; }

  ProductShape products(int64_t samples) const {
    return {.rows = samples, .inner = inputs_, .columns = y_row_, .a_row = x_row_, .b_row = y_row_, .out_row = y_row_};
  }
  ProductShape transposed_products(int64_t samples) const {
    return {.rows = samples, .inner = y_row_, .columns = x_row_, .a_row = y_row_, .b_row = x_row_, .out_row = x_row_};
  }

  // Wᵀ [outputs][x_row]; the columns beyond the inputs are 0, and stay so.
  const T* transpose_of(const T* packed, T* space) const {
    transpose(inputs_, y_row_, packed + weight_, y_row_, space, x_row_);
    return space;
  }

  void add_weight_gradient(int64_t samples, const T* x, const T* dy, T* gradient, bool with_bias) const {
    const OuterShape shape{samples, inputs_, y_row_, x_row_, y_row_, y_row_};
    add_outer(shape, x, dy, gradient + weight_);
    if (with_bias && bias_ >= 0) add_column_sums(samples, y_row_, dy, y_row_, gradient + bias_);
  }

  const int64_t inputs_, x_row_, y_row_, weight_, bias_;
  T *transposed_, *transposed_direction_;
};

}  // namespace

template <class T>
std::unique_ptr<Layer<T>> make_linear(const Node& node, const LayerContext<T>& context) {
  return std::make_unique<Linear<T>>(node, context);
}

template std::unique_ptr<Layer<float>> make_linear(const Node&, const LayerContext<float>&);
template std::unique_ptr<Layer<double>> make_linear(const Node&, const LayerContext<double>&);

}  // namespace innerloop::INNERLOOP_ISA
