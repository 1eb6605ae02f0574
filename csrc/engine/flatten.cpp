// flatten: an image to a vector in torch's order [C, H, W]; and add: the sum of two values.
#include <algorithm>

#include "engine/layers.h"

namespace innerloop::INNERLOOP_ISA {
namespace {

template <class T>
class Flatten final : public Layer<T> {
 public:
  Flatten(const Node& node, const LayerContext<T>& context)
      : x_(context.value(node.inputs[0])), y_(context.value(node.output)) {}

  Reads reads() const override { return {.x = false, .dy = false, .x_tangent = false}; }

  void forward(const T*, const Primal<T>& p) override { flatten(p.samples, p.x[0], p.y); }
  void backward(const T*, const Primal<T>& p, T*) override {
    if (p.dx[0]) unflatten(p.samples, p.dy, p.dx[0]);
  }
  void forward_tangent(const T*, const T*, const Primal<T>& p, const Tangent<T>& t) override {
    flatten(p.samples, t.x[0], t.y);
  }
  void backward_tangent(const T*, const T*, const Primal<T>& p, const Tangent<T>& t, T*) override {
    if (t.dx[0]) unflatten(p.samples, t.dy, t.dx[0]);
  }

 private:
  void flatten(int64_t samples, const T* x, T* y) const {
    for (int64_t n = 0; n < samples; ++n) {
      T* sample = y + n * y_.stride;
      for (int64_t h = 0; h < x_.shape.height; ++h) {
        const T* row = x + x_.row(n, h);
        for (int64_t w = 0; w < x_.shape.width; ++w) {
          for (int64_t c = 0; c < x_.shape.channels; ++c) {
            sample[c * x_.pixels() + h * x_.shape.width + w] = row[w * x_.stride + c];
          }
        }
      }
    }
  }

  void unflatten(int64_t samples, const T* dy, T* dx) const {
    for (int64_t n = 0; n < samples; ++n) {
      const T* sample = dy + n * y_.stride;
      for (int64_t pixel = 0; pixel < x_.pixels(); ++pixel, dx += x_.stride) {
        for (int64_t c = 0; c < x_.shape.channels; ++c) dx[c] = sample[c * x_.pixels() + pixel];
        std::fill(dx + x_.shape.channels, dx + x_.stride, T(0));
      }
    }
  }

  const ValueLayout x_, y_;
};

template <class T>
class Add final : public Layer<T> {
 public:
  Add(const Node& node, const LayerContext<T>& context)
      : inputs_{context.value(node.inputs[0]), context.value(node.inputs[1])}, y_(context.value(node.output)) {}

  Reads reads() const override { return {.x = false, .dy = false, .x_tangent = false}; }

  void forward(const T*, const Primal<T>& p) override { sum(p.samples, p.x, p.y); }
  void backward(const T*, const Primal<T>& p, T*) override { spread(p.samples, p.dy, p.dx); }
  void forward_tangent(const T*, const T*, const Primal<T>& p, const Tangent<T>& t) override {
    sum(p.samples, t.x, t.y);
  }
  void backward_tangent(const T*, const T*, const Primal<T>& p, const Tangent<T>& t, T*) override {
    spread(p.samples, t.dy, t.dx);
  }

 private:
  // Either input may be absent: a tangent that does not move.
  void sum(int64_t samples, const T* const* x, T* y) const {
    for (int64_t n = 0; n < samples; ++n) {
      for (int64_t h = 0; h < y_.shape.height; ++h) {
        T* to = y + y_.row(n, h);
        std::fill_n(to, y_.dense_row(), T(0));
        for (int i = 0; i < 2; ++i) {
          if (!x[i]) continue;
          const T* from = x[i] + inputs_[i].row(n, h);
          for (int64_t e = 0; e < y_.dense_row(); ++e) to[e] += from[e];
        }
      }
    }
  }

  void spread(int64_t samples, const T* dy, T* const* dx) const {
    for (int i = 0; i < 2; ++i) {
      if (dx[i]) std::copy_n(dy, samples * y_.dense_size(), dx[i]);
    }
  }

  const ValueLayout inputs_[2], y_;
};

}  // namespace

template <class T>
std::unique_ptr<Layer<T>> make_flatten(const Node& node, const LayerContext<T>& context) {
  return std::make_unique<Flatten<T>>(node, context);
}

template <class T>
std::unique_ptr<Layer<T>> make_add(const Node& node, const LayerContext<T>& context) {
  return std::make_unique<Add<T>>(node, context);
}

template std::unique_ptr<Layer<float>> make_flatten(const Node&, const LayerContext<float>&);
template std::unique_ptr<Layer<double>> make_flatten(const Node&, const LayerContext<double>&);
template std::unique_ptr<Layer<float>> make_add(const Node&, const LayerContext<float>&);
template std::unique_ptr<Layer<double>> make_add(const Node&, const LayerContext<double>&);

}  // namespace innerloop::INNERLOOP_ISA
