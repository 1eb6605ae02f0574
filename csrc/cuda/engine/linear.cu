#include "cuda/engine/affine.h"

namespace innerloop::gpu {
namespace {

template <class T>
class Linear final : public Layer<T> {
 public:
  Linear(const Node& node, const LayerContext<T>& context) : affine_(node, context), scratch_(context.scratch) {}

  ScratchSize scratch_size(int64_t samples) const override {
    ScratchSize size = affine_.scratch_size(samples);
    size.product = std::max(size.product, samples * affine_.inputs());
    return size;
  }

  void forward(const Parameters<T>& theta, const Primal<T>& p) override {
    affine_.forward(p.tasks, p.samples, p.x[0], theta, p.y);
  }

  void backward(const Parameters<T>& theta, const Primal<T>& p, const Parameters<T>& gradient) override {
    affine_.add_gradient(p.tasks, p.samples, p.x[0], p.dy, gradient);
    if (p.dx[0]) affine_.input_gradient(p.tasks, p.samples, p.dy, theta, p.dx[0]);
  }

  void forward_tangent(const Parameters<T>& theta, const Parameters<T>& direction, const Primal<T>& p,
                       const Tangent<T>& t) override {
    affine_.forward_tangent(p.tasks, p.samples, p.x[0], t.x[0], theta, direction, t.y);
  }

  void backward_tangent(const Parameters<T>& theta, const Parameters<T>& direction, const Primal<T>& p,
                        const Tangent<T>& t, const Parameters<T>& product) override {
    affine_.add_gradient_tangent(p.tasks, p.samples, p.x[0], t.x[0], p.dy, t.dy, product);
    if (t.dx[0]) {
      affine_.input_gradient_tangent(p.tasks, p.samples, p.dy, t.dy, theta, direction, t.dx[0], scratch_.product);
    }
  }

 private:
  const Affine<T> affine_;
  const Scratch<T>& scratch_;
};

}  // namespace

template <class T>
std::unique_ptr<Layer<T>> make_linear(const Node& node, const LayerContext<T>& context) {
  return std::make_unique<Linear<T>>(node, context);
}

template std::unique_ptr<Layer<float>> make_linear(const Node&, const LayerContext<float>&);
template std::unique_ptr<Layer<double>> make_linear(const Node&, const LayerContext<double>&);

}  // namespace innerloop::gpu
