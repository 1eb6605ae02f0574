// Pooling over windows; padding is outside the image and skipped.
#include "cuda/engine/each.h"
#include "cuda/engine/layer.h"

namespace innerloop::gpu {
namespace {

struct Windows {
  Windows(const Node& node, const Shape& from, const Shape& to) : x(from), y(to), window(node.window) {
    if (node.kind == Kind::global_avg_pool) {
      window.kernel_height = window.stride_height = x.height;
      window.kernel_width = window.stride_width = x.width;
    }
  }

  // Calls visit(element of x, position in the window) for the valid positions of the window of element i of y, row by
  // row.
  template <class Visit>
  __device__ void for_window(int64_t i, Visit& visit) const {
    const int64_t c = i % y.channels, pixel = i / y.channels;
    const int64_t w_out = pixel % y.width, h_out = pixel / y.width % y.height, n = pixel / y.width / y.height;
    for (int64_t kh = 0; kh < window.kernel_height; ++kh) {
      const int64_t h = h_out * window.stride_height - window.pad_height + kh;
      if (h < 0 || h >= x.height) continue;
      for (int64_t kw = 0; kw < window.kernel_width; ++kw) {
        const int64_t w = w_out * window.stride_width - window.pad_width + kw;
        if (w < 0 || w >= x.width) continue;
        visit(((n * x.height + h) * x.width + w) * x.channels + c, kh * window.kernel_width + kw);
      }
    }
  }

  // Calls visit(element of y, position in its window) for the windows that element i of x lies in.
  template <class Visit>
  __device__ void for_windows_over(int64_t i, Visit& visit) const {
    const int64_t c = i % x.channels, pixel = i / x.channels;
    const int64_t w_in = pixel % x.width, h_in = pixel / x.width % x.height, n = pixel / x.width / x.height;
    for (int64_t kh = 0; kh < window.kernel_height; ++kh) {
      const int64_t h = h_in + window.pad_height - kh;
      if (h < 0 || h % window.stride_height != 0 || h / window.stride_height >= y.height) continue;
      for (int64_t kw = 0; kw < window.kernel_width; ++kw) {
        const int64_t w = w_in + window.pad_width - kw;
        if (w < 0 || w % window.stride_width != 0 || w / window.stride_width >= y.width) continue;
        visit(((n * y.height + h / window.stride_height) * y.width + w / window.stride_width) * y.channels + c,
              kh * window.kernel_width + kw);
      }
    }
  }

  Shape x, y;
  Window window;
};

// --- max ------------------------------------------------------------------------------------------

// The first maximum in row-major order takes all; NaN counts as a maximum. So torch has it.
template <class T>
struct Largest {
  const T* x;
  T value;
  int64_t position = -1;
  __device__ void operator()(int64_t element, int64_t here) {
    const T candidate = x[element];
    if (position >= 0 && !(candidate > value) && candidate == candidate) return;
    value = candidate;
    position = here;
  }
};

template <class T>
struct TakeLargest {
  Windows windows;
  const T* x;
  T* y;
  T* taken;
  __device__ void operator()(int64_t i) const {
    Largest<T> largest{x, T(0)};
    windows.for_window(i, largest);
    y[i] = largest.value;
    taken[i] = static_cast<T>(largest.position);
  }
};

template <class T>
struct AtPosition {
  const T* x;
  T wanted, value = 0;
  __device__ void operator()(int64_t element, int64_t position) {
    if (static_cast<T>(position) == wanted) value = x[element];
  }
};

template <class T>
struct TakeTaken {  // ẏ from ẋ
  Windows windows;
  const T* x;
  const T* taken;
  T* y;
  __device__ void operator()(int64_t i) const {
    AtPosition<T> at{x, taken[i]};
    windows.for_window(i, at);
    y[i] = at.value;
  }
};

template <class T>
struct SumTaken {
  const T* dy;
  const T* taken;
  T value = 0;
  __device__ void operator()(int64_t element, int64_t position) {
    if (taken[element] == static_cast<T>(position)) value += dy[element];
  }
};

template <class T>
struct SpreadTaken {  // dx from dy
  Windows windows;
  const T* dy;
  const T* taken;
  T* dx;
  __device__ void operator()(int64_t i) const {
    SumTaken<T> sum{dy, taken};
    windows.for_windows_over(i, sum);
    dx[i] = sum.value;
  }
};

template <class T>
class MaxPool final : public Layer<T> {
 public:
  MaxPool(const Node& node, const LayerContext<T>& context)
      : device_(context.device), windows_(node, context.value(node.inputs[0]), context.value(node.output)) {}

  // For every output, the position in its window that it comes from.
  int64_t state_size(int64_t samples) const override { return samples * windows_.y.size(); }

  void forward(const Parameters<T>&, const Primal<T>& p) override {
    each(device_, outputs(p), TakeLargest<T>{windows_, p.x[0], p.y, p.state});
  }
  void backward(const Parameters<T>&, const Primal<T>& p, const Parameters<T>&) override {
    if (p.dx[0]) each(device_, inputs(p), SpreadTaken<T>{windows_, p.dy, p.state, p.dx[0]});
  }
  void forward_tangent(const Parameters<T>&, const Parameters<T>&, const Primal<T>& p, const Tangent<T>& t) override {
    each(device_, outputs(p), TakeTaken<T>{windows_, t.x[0], p.state, t.y});
  }
  void backward_tangent(const Parameters<T>&, const Parameters<T>&, const Primal<T>& p, const Tangent<T>& t,
                        const Parameters<T>&) override {
    if (t.dx[0]) each(device_, inputs(p), SpreadTaken<T>{windows_, t.dy, p.state, t.dx[0]});
  }

 private:
  int64_t inputs(const Primal<T>& p) const { return p.tasks * p.samples * windows_.x.size(); }
  int64_t outputs(const Primal<T>& p) const { return p.tasks * p.samples * windows_.y.size(); }

  const Device& device_;
  const Windows windows_;
};

// --- average --------------------------------------------------------------------------------------

template <class T>
struct SumValues {
  const T* x;
  T value = 0;
  int64_t count = 0;
  __device__ void operator()(int64_t element, int64_t) {
    value += x[element];
    ++count;
  }
};

struct Count {
  int64_t count = 0;
  __device__ void operator()(int64_t, int64_t) { ++count; }
};

template <class T>
struct Average {
  Windows windows;
  int64_t divisor;  // 0: the number of valid positions
  const T* x;
  T* y;
  __device__ void operator()(int64_t i) const {
    SumValues<T> sum{x};
    windows.for_window(i, sum);
    y[i] = sum.value / static_cast<T>(divisor > 0 ? divisor : sum.count);
  }
};

template <class T>
struct SumShares {
  const Windows& windows;
  int64_t divisor;
  const T* dy;
  T value = 0;
  __device__ void operator()(int64_t element, int64_t) {
    Count valid;
    if (divisor == 0) windows.for_window(element, valid);
    value += dy[element] / static_cast<T>(divisor > 0 ? divisor : valid.count);
  }
};

template <class T>
struct Spread {
  Windows windows;
  int64_t divisor;
  const T* dy;
  T* dx;
  __device__ void operator()(int64_t i) const {
    SumShares<T> sum{windows, divisor, dy};
    windows.for_windows_over(i, sum);
    dx[i] = sum.value;
  }
};

template <class T>
class AveragePool final : public Layer<T> {
 public:
  AveragePool(const Node& node, const LayerContext<T>& context)
      : device_(context.device), windows_(node, context.value(node.inputs[0]), context.value(node.output)) {
    const Window& w = windows_.window;
    const bool no_padding = w.pad_height == 0 && w.pad_width == 0;  // then every window is whole
    if (node.flag || no_padding) divisor_ = w.kernel_height * w.kernel_width;
  }

  void forward(const Parameters<T>&, const Primal<T>& p) override { average(p, p.x[0], p.y); }
  void backward(const Parameters<T>&, const Primal<T>& p, const Parameters<T>&) override { spread(p, p.dy, p.dx[0]); }
  void forward_tangent(const Parameters<T>&, const Parameters<T>&, const Primal<T>& p, const Tangent<T>& t) override {
    average(p, t.x[0], t.y);
  }
  void backward_tangent(const Parameters<T>&, const Parameters<T>&, const Primal<T>& p, const Tangent<T>& t,
                        const Parameters<T>&) override {
    spread(p, t.dy, t.dx[0]);
  }

 private:
  void average(const Primal<T>& p, const T* x, T* y) const {
    each(device_, p.tasks * p.samples * windows_.y.size(), Average<T>{windows_, divisor_, x, y});
  }
  void spread(const Primal<T>& p, const T* dy, T* dx) const {
    if (dx) each(device_, p.tasks * p.samples * windows_.x.size(), Spread<T>{windows_, divisor_, dy, dx});
  }

  const Device& device_;
  const Windows windows_;
  int64_t divisor_ = 0;
};

}  // namespace

template <class T>
std::unique_ptr<Layer<T>> make_pool(const Node& node, const LayerContext<T>& context) {
  if (node.kind == Kind::max_pool) return std::make_unique<MaxPool<T>>(node, context);
  return std::make_unique<AveragePool<T>>(node, context);
}

template std::unique_ptr<Layer<float>> make_pool(const Node&, const LayerContext<float>&);
template std::unique_ptr<Layer<double>> make_pool(const Node&, const LayerContext<double>&);

}  // namespace innerloop::gpu
