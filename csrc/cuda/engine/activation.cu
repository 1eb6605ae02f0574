// y = f(x), element by element.
#include "cuda/engine/each.h"
#include "cuda/engine/layer.h"
#include "engine/activation_functions.h"

namespace innerloop::gpu {
namespace {

template <class T, class Function>
struct Value {
  Function f;
  const T* x;
  T* y;
  __device__ void operator()(int64_t i) const { y[i] = f.value(x[i]); }
};

// dx = f′(x) dy, and as well ẏ = f′(x) ẋ
template <class T, class Function>
struct TimesSlope {
  Function f;
  const T* x;
  const T* from;
  T* to;
  __device__ void operator()(int64_t i) const { to[i] = f.slope(x[i]) * from[i]; }
};

// dẋ = f′(x) dẏ + f″(x) ẋ dy
template <class T, class Function>
struct SlopeTangent {
  Function f;
  const T* x;
  const T* x_tangent;
  const T* dy;
  const T* dy_tangent;
  T* to;
  __device__ void operator()(int64_t i) const {
    to[i] = f.slope(x[i]) * dy_tangent[i] + f.curvature(x[i]) * x_tangent[i] * dy[i];
  }
};

template <class T, class Function>
class Activation final : public Layer<T> {
 public:
  Activation(Function function, const Node& node, const LayerContext<T>& context)
      : device_(context.device), f_(function), size_(context.value(node.output).size()) {}

  void forward(const Parameters<T>&, const Primal<T>& p) override {
    each(device_, count(p), Value<T, Function>{f_, p.x[0], p.y});
  }

  void backward(const Parameters<T>&, const Primal<T>& p, const Parameters<T>&) override {
    if (p.dx[0]) each(device_, count(p), TimesSlope<T, Function>{f_, p.x[0], p.dy, p.dx[0]});
  }

  void forward_tangent(const Parameters<T>&, const Parameters<T>&, const Primal<T>& p, const Tangent<T>& t) override {
    each(device_, count(p), TimesSlope<T, Function>{f_, p.x[0], t.x[0], t.y});
  }

  void backward_tangent(const Parameters<T>&, const Parameters<T>&, const Primal<T>& p, const Tangent<T>& t,
                        const Parameters<T>&) override {
    if (!t.dx[0]) return;
    if constexpr (Function::is_piecewise_linear) {
      each(device_, count(p), TimesSlope<T, Function>{f_, p.x[0], t.dy, t.dx[0]});
    } else {
      each(device_, count(p), SlopeTangent<T, Function>{f_, p.x[0], t.x[0], p.dy, t.dy, t.dx[0]});
    }
  }

 private:
  int64_t count(const Primal<T>& p) const { return p.tasks * p.samples * size_; }

  const Device& device_;
  const Function f_;
  const int64_t size_;
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

}  // namespace innerloop::gpu
