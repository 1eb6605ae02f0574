// y = f(x), element by element.
#include <cmath>
#include <numbers>

#include "engine/layers.h"

namespace innerloop::INNERLOOP_ISA {
namespace {

// A function is a struct of value(x), slope(x) = f′ and curvature(x) = f″. Where f″ is 0 everywhere it says so.

template <class T>
struct LeakyReLU {  // ReLU where the slope is 0; torch's f′(0) is the slope
  T negative_slope;
  static constexpr bool is_piecewise_linear = true;
  T value(T x) const { return x > 0 ? x : negative_slope * x; }
  T slope(T x) const { return x > 0 ? T(1) : negative_slope; }
  T curvature(T) const { return 0; }
};

template <class T>
struct ReLU {  // not the above with slope 0: that would make NaN of infinity
  static constexpr bool is_piecewise_linear = true;
  T value(T x) const { return x <= 0 ? T(0) : x; }  // NaN stays NaN, as in torch
  T slope(T x) const { return x > 0 ? T(1) : T(0); }
  T curvature(T) const { return 0; }
};

template <class T>
struct Tanh {
  static constexpr bool is_piecewise_linear = false;
  T value(T x) const { return std::tanh(x); }
  T slope(T x) const {
    const T y = std::tanh(x);
    return 1 - y * y;
  }
  T curvature(T x) const {
    const T y = std::tanh(x);
    return -2 * y * (1 - y * y);
  }
};

template <class T>
struct Sigmoid {
  static constexpr bool is_piecewise_linear = false;
  T value(T x) const { return 1 / (1 + std::exp(-x)); }
  T slope(T x) const {
    const T y = value(x);
    return y * (1 - y);
  }
  T curvature(T x) const {
    const T y = value(x);
    return y * (1 - y) * (1 - 2 * y);
  }
};

template <class T>
struct GeluErf {  // x Φ(x), with φ = Φ′
  static constexpr bool is_piecewise_linear = false;
  static T cumulative(T x) { return T(0.5) * std::erfc(-x * std::numbers::sqrt2_v<T> / 2); }
  static T density(T x) { return std::exp(-x * x / 2) * std::numbers::inv_sqrtpi_v<T> / std::numbers::sqrt2_v<T>; }
  T value(T x) const { return x * cumulative(x); }
  T slope(T x) const { return cumulative(x) + x * density(x); }
  T curvature(T x) const { return (2 - x * x) * density(x); }
};

template <class T>
struct GeluTanh {  // x (1 + tanh u)/2 with u = √(2/π) (x + 0.044715 x³)
  static constexpr bool is_piecewise_linear = false;
  static constexpr T a = T(0.044715);
  static constexpr T b = std::numbers::sqrt2_v<T> * std::numbers::inv_sqrtpi_v<T>;
  T value(T x) const { return T(0.5) * x * (1 + std::tanh(b * (x + a * x * x * x))); }
  T slope(T x) const {
    const T h = std::tanh(b * (x + a * x * x * x)), u1 = b * (1 + 3 * a * x * x);
    return T(0.5) * (1 + h + x * (1 - h * h) * u1);
  }
  T curvature(T x) const {
    const T h = std::tanh(b * (x + a * x * x * x)), u1 = b * (1 + 3 * a * x * x), u2 = 6 * a * b * x;
    return (1 - h * h) * (u1 + T(0.5) * x * (u2 - 2 * h * u1 * u1));
  }
};

template <class T, class Function>
class Activation final : public Layer<T> {
 public:
  Activation(Function function, const Node& node, const LayerContext<T>& context)
      : f_(function), x_(context.value(node.inputs[0])), y_(context.value(node.output)) {}

  void forward(const T*, const Primal<T>& p) override {
    for_rows(p.samples, [&](int64_t row, int64_t x, int64_t y) {
      const T* __restrict from = p.x[0] + x;
      T* __restrict to = p.y + y;
      for (int64_t i = 0; i < row; ++i) to[i] = f_.value(from[i]);
      if (f_.value(T(0)) != 0) clear_padding(to);
    });
  }

  void backward(const T*, const Primal<T>& p, T*) override {
    if (!p.dx[0]) return;
    for_rows(p.samples, [&, dense = int64_t{0}](int64_t row, int64_t x, int64_t) mutable {
      const T* __restrict from = p.x[0] + x;
      const T* __restrict dy = p.dy + dense;
      T* __restrict dx = p.dx[0] + dense;
      for (int64_t i = 0; i < row; ++i) dx[i] = f_.slope(from[i]) * dy[i];
      dense += row;
    });
  }

  // ẏ = f′(x) ẋ
  void forward_tangent(const T*, const T*, const Primal<T>& p, const Tangent<T>& t) override {
    for_rows(p.samples, [&](int64_t row, int64_t x, int64_t y) {
      const T* __restrict from = p.x[0] + x;
      const T* __restrict along = t.x[0] + x;
      T* __restrict to = t.y + y;
      for (int64_t i = 0; i < row; ++i) to[i] = f_.slope(from[i]) * along[i];
    });
  }

  // dẋ = f′(x) dẏ + f″(x) ẋ dy
  void backward_tangent(const T*, const T*, const Primal<T>& p, const Tangent<T>& t, T*) override {
    if (!t.dx[0]) return;
    for_rows(p.samples, [&, dense = int64_t{0}](int64_t row, int64_t x, int64_t) mutable {
      const T* __restrict from = p.x[0] + x;
      const T* __restrict along = t.x[0] + x;
      const T* __restrict dy = p.dy + dense;
      const T* __restrict dy_tangent = t.dy + dense;
      T* __restrict to = t.dx[0] + dense;
      for (int64_t i = 0; i < row; ++i) to[i] = f_.slope(from[i]) * dy_tangent[i];
      if constexpr (!Function::is_piecewise_linear) {
        for (int64_t i = 0; i < row; ++i) to[i] += f_.curvature(from[i]) * along[i] * dy[i];
      }
      dense += row;
    });
  }

 private:
  // Calls visit(elements, offset in x, offset in y) for every row of every sample.
  template <class Visit>
  void for_rows(int64_t samples, Visit visit) const {
    for (int64_t n = 0; n < samples; ++n) {
      for (int64_t h = 0; h < x_.shape.height; ++h) visit(x_.dense_row(), x_.row(n, h), y_.row(n, h));
    }
  }

  void clear_padding(T* row) const {
    for (int64_t w = 0; w < y_.shape.width; ++w) {
      for (int64_t c = y_.shape.channels; c < y_.stride; ++c) row[w * y_.stride + c] = 0;
    }
  }

  const Function f_;
  const ValueLayout x_, y_;
};

template <class Function, class T>
std::unique_ptr<Layer<T>> made(Function function, const Node& node, const LayerContext<T>& context) {
  return std::make_unique<Activation<T, Function>>(function, node, context);
}

}  // namespace

template <class T>
std::unique_ptr<Layer<T>> make_activation(const Node& node, const LayerContext<T>& context) {
  switch (node.kind) {
    case Kind::relu:
      return made(ReLU<T>{}, node, context);
    case Kind::leaky_relu:
      return made(LeakyReLU<T>{static_cast<T>(node.number)}, node, context);
    case Kind::tanh:
      return made(Tanh<T>{}, node, context);
    case Kind::sigmoid:
      return made(Sigmoid<T>{}, node, context);
    default:  // gelu
      return node.flag ? made(GeluTanh<T>{}, node, context) : made(GeluErf<T>{}, node, context);
  }
}

template std::unique_ptr<Layer<float>> make_activation(const Node&, const LayerContext<float>&);
template std::unique_ptr<Layer<double>> make_activation(const Node&, const LayerContext<double>&);

}  // namespace innerloop::INNERLOOP_ISA
