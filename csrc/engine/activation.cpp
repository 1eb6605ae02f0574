// y = f(x), element by element.
#include "engine/activation_functions.h"
#include "engine/layers.h"

namespace innerloop::INNERLOOP_ISA {
namespace {

template <class T, class Function>
class Activation final : public Layer<T> {
 public:
  Activation(Function function, const Node& node, const LayerContext<T>& context)
      : f_(function), x_(context.value(node.inputs[0])), y_(context.value(node.output)) {}

  Reads reads() const override {
    return {.x = true, .dy = !Function::is_piecewise_linear, .x_tangent = !Function::is_piecewise_linear};
  }

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

}  // namespace

template <class T>
std::unique_ptr<Layer<T>> make_activation(const Node& node, const LayerContext<T>& context) {
  return with_activation<T>(node, [&]<class Function>(const Function& f) -> std::unique_ptr<Layer<T>> {
    return std::make_unique<Activation<T, Function>>(f, node, context);
  });
}

template std::unique_ptr<Layer<float>> make_activation(const Node&, const LayerContext<float>&);
template std::unique_ptr<Layer<double>> make_activation(const Node&, const LayerContext<double>&);

}  // namespace innerloop::INNERLOOP_ISA
