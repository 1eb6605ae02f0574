// A convolution is y = p Wᵀ + b for its patches p, a row of [channel][kernel row][kernel column] for every pixel of the
// output: the order of torch's weights. The patches are gathered anew for every function; keeping them would take
// kernel height × kernel width times the memory of x.
#include "cuda/engine/affine.h"

namespace innerloop::gpu {
namespace {

struct Patches {
  Shape x, y;
  Window window;

  int64_t taps() const { return window.kernel_height * window.kernel_width; }
  int64_t columns() const { return x.channels * taps(); }
  int64_t pixels() const { return y.height * y.width; }  // of the output
  // A convolution of one pixel that reads every pixel has x for its patches.
  bool are_x() const {
    const Window& w = window;
    return taps() == 1 && w.stride_height == 1 && w.stride_width == 1 && w.pad_height == 0 && w.pad_width == 0;
  }
};

template <class T>
struct Gather {
  Patches at;
  int64_t columns, taps;
  const T* x;
  T* patches;

  __device__ void operator()(int64_t i) const {
    const Window& w = at.window;
    const int64_t column = i % columns, row = i / columns;
    const int64_t c = column / taps, tap = column % taps;
    const int64_t w_out = row % at.y.width, h_out = row / at.y.width % at.y.height;
    const int64_t n = row / at.y.width / at.y.height;  // of all samples of all tasks
    const int64_t h_in = h_out * w.stride_height - w.pad_height + tap / w.kernel_width;
    const int64_t w_in = w_out * w.stride_width - w.pad_width + tap % w.kernel_width;
    const bool inside = h_in >= 0 && h_in < at.x.height && w_in >= 0 && w_in < at.x.width;
    patches[i] = inside ? x[((n * at.x.height + h_in) * at.x.width + w_in) * at.x.channels + c] : T(0);
  }
};

// The transpose of it: every pixel of x adds up what its copies in patches were given, tap by tap.
template <class T>
struct Collect {
  Patches at;
  int64_t columns, taps;
  const T* patches;
  T* dx;

  __device__ void operator()(int64_t i) const {
    const Window& w = at.window;
    const int64_t c = i % at.x.channels, pixel = i / at.x.channels;
    const int64_t w_in = pixel % at.x.width, h_in = pixel / at.x.width % at.x.height;
    const int64_t n = pixel / at.x.width / at.x.height;
    T sum = 0;
    for (int64_t kh = 0; kh < w.kernel_height; ++kh) {
      const int64_t h = h_in + w.pad_height - kh;
      if (h < 0 || h % w.stride_height != 0 || h / w.stride_height >= at.y.height) continue;
      for (int64_t kw = 0; kw < w.kernel_width; ++kw) {
        const int64_t v = w_in + w.pad_width - kw;
        if (v < 0 || v % w.stride_width != 0 || v / w.stride_width >= at.y.width) continue;
        const int64_t row = (n * at.y.height + h / w.stride_height) * at.y.width + v / w.stride_width;
        sum += patches[row * columns + c * taps + kh * w.kernel_width + kw];
      }
    }
    dx[i] = sum;
  }
};

template <class T>
class Conv2d final : public Layer<T> {
 public:
  Conv2d(const Node& node, const LayerContext<T>& context)
      : device_(context.device),
        scratch_(context.scratch),
        affine_(node, context),
        weight_(node.weight),
        patches_{context.value(node.inputs[0]), context.value(node.output), node.window} {}

  ScratchSize scratch_size(int64_t samples) const override {
    ScratchSize size = affine_.scratch_size(rows(samples));
    size.patches = rows(samples) * patches_.columns();
    return size;
  }

  void forward(const Parameters<T>& theta, const Primal<T>& p) override {
    affine_.forward(p.tasks, rows(p.samples), gather(p, p.x[0], 0), theta, p.y);
  }

  void backward(const Parameters<T>& theta, const Primal<T>& p, const Parameters<T>& gradient) override {
    const T* x = at(gradient, weight_) ? gather(p, p.x[0], 0) : nullptr;
    affine_.add_gradient(p.tasks, rows(p.samples), x, p.dy, gradient);
    if (!p.dx[0]) return;
    T* into = patches_.are_x() ? p.dx[0] : scratch_.patches[0];
    affine_.input_gradient(p.tasks, rows(p.samples), p.dy, theta, into);
    collect(p, into, p.dx[0]);
  }

  void forward_tangent(const Parameters<T>& theta, const Parameters<T>& direction, const Primal<T>& p,
                       const Tangent<T>& t) override {
    const T* x = at(direction, weight_) ? gather(p, p.x[0], 0) : nullptr;
    const T* x_tangent = t.x[0] ? gather(p, t.x[0], 1) : nullptr;
    affine_.forward_tangent(p.tasks, rows(p.samples), x, x_tangent, theta, direction, t.y);
  }

  void backward_tangent(const Parameters<T>& theta, const Parameters<T>& direction, const Primal<T>& p,
                        const Tangent<T>& t, const Parameters<T>& product) override {
    const bool wanted = at(product, weight_) != nullptr;
    const T* x = wanted ? gather(p, p.x[0], 0) : nullptr;
    const T* x_tangent = wanted && t.x[0] ? gather(p, t.x[0], 1) : nullptr;
    affine_.add_gradient_tangent(p.tasks, rows(p.samples), x, x_tangent, p.dy, t.dy, product);
    if (!t.dx[0]) return;
    T* into = patches_.are_x() ? t.dx[0] : scratch_.patches[0];
    affine_.input_gradient_tangent(p.tasks, rows(p.samples), p.dy, t.dy, theta, direction, into, scratch_.patches[1]);
    collect(p, into, t.dx[0]);
  }

 private:
  int64_t rows(int64_t samples) const { return samples * patches_.pixels(); }

  const T* gather(const Primal<T>& p, const T* x, int buffer) const {
    if (patches_.are_x()) return x;
    T* to = scratch_.patches[buffer];
    each(device_, p.tasks * rows(p.samples) * patches_.columns(),
         Gather<T>{patches_, patches_.columns(), patches_.taps(), x, to});
    return to;
  }

  void collect(const Primal<T>& p, const T* from, T* dx) const {
    if (patches_.are_x()) return;
    each(device_, p.tasks * p.samples * patches_.x.size(),
         Collect<T>{patches_, patches_.columns(), patches_.taps(), from, dx});
  }

  const Device& device_;
  const Scratch<T>& scratch_;
  const Affine<T> affine_;
  const int weight_;
  const Patches patches_;
};

}  // namespace

template <class T>
std::unique_ptr<Layer<T>> make_conv2d(const Node& node, const LayerContext<T>& context) {
  return std::make_unique<Conv2d<T>>(node, context);
}

template std::unique_ptr<Layer<float>> make_conv2d(const Node&, const LayerContext<float>&);
template std::unique_ptr<Layer<double>> make_conv2d(const Node&, const LayerContext<double>&);

}  // namespace innerloop::gpu
