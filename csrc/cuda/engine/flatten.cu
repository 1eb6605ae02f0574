// flatten: from channels-last images to torch's order [channels][height][width]; add: the sum of two values.
#include "cuda/engine/each.h"
#include "cuda/engine/layer.h"

namespace innerloop::gpu {
namespace {

template <class T>
struct Reorder {  // [images][rows][columns] to [images][columns][rows]
  const T* from;
  T* to;
  int64_t rows, columns;
  __device__ void operator()(int64_t i) const {
    const int64_t row = i % rows, column = i / rows % columns, image = i / rows / columns;
    to[i] = from[(image * rows + row) * columns + column];
  }
};

template <class T>
class Flatten final : public Layer<T> {
 public:
  Flatten(const Node& node, const LayerContext<T>& context)
      : device_(context.device), x_(context.value(node.inputs[0])) {}

  void forward(const Parameters<T>&, const Primal<T>& p) override { to_torch(p, p.x[0], p.y); }
  void backward(const Parameters<T>&, const Primal<T>& p, const Parameters<T>&) override {
    if (p.dx[0]) from_torch(p, p.dy, p.dx[0]);
  }
  void forward_tangent(const Parameters<T>&, const Parameters<T>&, const Primal<T>& p, const Tangent<T>& t) override {
    to_torch(p, t.x[0], t.y);
  }
  void backward_tangent(const Parameters<T>&, const Parameters<T>&, const Primal<T>& p, const Tangent<T>& t,
                        const Parameters<T>&) override {
    if (t.dx[0]) from_torch(p, t.dy, t.dx[0]);
  }

 private:
  int64_t pixels() const { return x_.height * x_.width; }
  int64_t count(const Primal<T>& p) const { return p.tasks * p.samples * x_.size(); }
  void to_torch(const Primal<T>& p, const T* x, T* y) const {
    each(device_, count(p), Reorder<T>{x, y, pixels(), x_.channels});
  }
  void from_torch(const Primal<T>& p, const T* y, T* x) const {
    each(device_, count(p), Reorder<T>{y, x, x_.channels, pixels()});
  }

  const Device& device_;
  const Shape x_;
};

template <class T>
struct Sum {  // a null pointer is 0
  const T* a;
  const T* b;
  T* to;
  __device__ void operator()(int64_t i) const { to[i] = (a ? a[i] : T(0)) + (b ? b[i] : T(0)); }
};

template <class T>
class AddValues final : public Layer<T> {
 public:
  AddValues(const Node& node, const LayerContext<T>& context)
      : device_(context.device), size_(context.value(node.output).size()) {}

  void forward(const Parameters<T>&, const Primal<T>& p) override { sum(p, p.x[0], p.x[1], p.y); }
  void backward(const Parameters<T>&, const Primal<T>& p, const Parameters<T>&) override { copy(p, p.dy, p.dx); }
  void forward_tangent(const Parameters<T>&, const Parameters<T>&, const Primal<T>& p, const Tangent<T>& t) override {
    sum(p, t.x[0], t.x[1], t.y);
  }
  void backward_tangent(const Parameters<T>&, const Parameters<T>&, const Primal<T>& p, const Tangent<T>& t,
                        const Parameters<T>&) override {
    copy(p, t.dy, t.dx);
  }

 private:
  void sum(const Primal<T>& p, const T* a, const T* b, T* to) const {
    each(device_, p.tasks * p.samples * size_, Sum<T>{a, b, to});
  }
  void copy(const Primal<T>& p, const T* dy, T* const (&dx)[2]) const {
    for (T* to : dx) {
      if (to) sum(p, dy, nullptr, to);
    }
  }

  const Device& device_;
  const int64_t size_;
};

}  // namespace

template <class T>
std::unique_ptr<Layer<T>> make_flatten(const Node& node, const LayerContext<T>& context) {
  return std::make_unique<Flatten<T>>(node, context);
}

template <class T>
std::unique_ptr<Layer<T>> make_add(const Node& node, const LayerContext<T>& context) {
  return std::make_unique<AddValues<T>>(node, context);
}

template std::unique_ptr<Layer<float>> make_flatten(const Node&, const LayerContext<float>&);
template std::unique_ptr<Layer<double>> make_flatten(const Node&, const LayerContext<double>&);
template std::unique_ptr<Layer<float>> make_add(const Node&, const LayerContext<float>&);
template std::unique_ptr<Layer<double>> make_add(const Node&, const LayerContext<double>&);

}  // namespace innerloop::gpu
