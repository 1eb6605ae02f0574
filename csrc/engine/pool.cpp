// Maximum and mean over windows of an image; the global mean is a window as large as the image.
#include <algorithm>
#include <cmath>
#include <limits>

#include "engine/layers.h"

namespace innerloop::INNERLOOP_ISA {
namespace {

// Where the windows of a pooling lie; padding is outside the image and skipped.
struct Windows {
  Windows(const Node& node, const ValueLayout& x, const ValueLayout& y)
      : x_layout(x), y_layout(y), window(node.window) {
    if (node.kind == Kind::global_avg_pool) {
      window.kernel_height = window.stride_height = x.shape.height;
      window.kernel_width = window.stride_width = x.shape.width;
    }
  }

  // Calls visit(offset of the pixel in x, in its dense gradient, in y, in y's dense gradient, number of the position in
  // the window) for every valid position of every window, row by row.
  template <class Visit>
  void for_positions(int64_t samples, const Visit& visit) const {
    const int64_t channels = x_layout.stride;
    int64_t y_dense = 0;
    for (int64_t n = 0; n < samples; ++n) {
      for (int64_t ho = 0; ho < y_layout.shape.height; ++ho) {
        for (int64_t wo = 0; wo < y_layout.shape.width; ++wo, y_dense += channels) {
          const int64_t y = y_layout.row(n, ho) + wo * channels;
          for (int64_t i = 0; i < window.kernel_height; ++i) {
            const int64_t h = ho * window.stride_height - window.pad_height + i;
            if (h < 0 || h >= x_layout.shape.height) continue;
            for (int64_t j = 0; j < window.kernel_width; ++j) {
              const int64_t w = wo * window.stride_width - window.pad_width + j;
              if (w < 0 || w >= x_layout.shape.width) continue;
              const int64_t x_dense = n * x_layout.dense_size() + (h * x_layout.shape.width + w) * channels;
              visit(x_layout.row(n, h) + w * channels, x_dense, y, y_dense, i * window.kernel_width + j);
            }
          }
        }
      }
    }
  }

  // Calls visit(offset in y, in its dense gradient, valid positions of the window) for every window.
  template <class Visit>
  void for_windows(int64_t samples, const Visit& visit) const {
    int64_t y_dense = 0;
    for (int64_t n = 0; n < samples; ++n) {
      for (int64_t ho = 0; ho < y_layout.shape.height; ++ho) {
        const int64_t rows =
            overlap(ho, window.stride_height, window.pad_height, window.kernel_height, x_layout.shape.height);
        for (int64_t wo = 0; wo < y_layout.shape.width; ++wo, y_dense += x_layout.stride) {
          const int64_t columns =
              overlap(wo, window.stride_width, window.pad_width, window.kernel_width, x_layout.shape.width);
          visit(y_layout.row(n, ho) + wo * x_layout.stride, y_dense, rows * columns);
        }
      }
    }
  }

  static int64_t overlap(int64_t index, int64_t stride, int64_t pad, int64_t kernel, int64_t size) {
    const int64_t first = index * stride - pad;
    return std::min(first + kernel, size) - std::max<int64_t>(first, 0);
  }

  ValueLayout x_layout, y_layout;
  Window window;
};

template <class T>
class MaxPool final : public Layer<T> {
 public:
  MaxPool(const Node& node, const LayerContext<T>& context)
      : windows_(node, context.value(node.inputs[0]), context.value(node.output)),
        channels_(windows_.x_layout.stride) {}

  Reads reads() const override { return {.x = false, .dy = false, .x_tangent = false}; }

  // For every output, the position in its window that it comes from.
  int64_t state_size(int64_t samples) const override { return samples * windows_.y_layout.dense_size(); }

  // The first maximum in row-major order takes all; NaN counts as a maximum. So torch has it.
  void forward(const T*, const Primal<T>& p) override {
    windows_.for_windows(p.samples, [&](int64_t y, int64_t y_dense, int64_t) {
      std::fill_n(p.y + y, channels_, -std::numeric_limits<T>::infinity());
      std::fill_n(p.state + y_dense, channels_, T(-1));
    });
    windows_.for_positions(p.samples, [&](int64_t x, int64_t, int64_t y, int64_t y_dense, int64_t position) {
      const T* __restrict from = p.x[0] + x;
      T* __restrict to = p.y + y;
      T* __restrict taken = p.state + y_dense;
      const T here = static_cast<T>(position);
      for (int64_t c = 0; c < channels_; ++c) {
        const bool larger = from[c] > to[c] || from[c] != from[c] || taken[c] < 0;
        to[c] = larger ? from[c] : to[c];
        taken[c] = larger ? here : taken[c];
      }
    });
  }

  void backward(const T*, const Primal<T>& p, T*) override { spread(p, p.dy, p.dx[0]); }

  void forward_tangent(const T*, const T*, const Primal<T>& p, const Tangent<T>& t) override {
    windows_.for_positions(p.samples, [&](int64_t x, int64_t, int64_t y, int64_t y_dense, int64_t position) {
      const T* __restrict from = t.x[0] + x;
      const T* __restrict taken = p.state + y_dense;
      T* __restrict to = t.y + y;
      const T here = static_cast<T>(position);
      for (int64_t c = 0; c < channels_; ++c) to[c] = taken[c] == here ? from[c] : to[c];
    });
  }

  void backward_tangent(const T*, const T*, const Primal<T>& p, const Tangent<T>& t, T*) override {
    spread(p, t.dy, t.dx[0]);
  }

 private:
  void spread(const Primal<T>& p, const T* dy, T* dx) const {
    if (!dx) return;
    std::fill_n(dx, p.samples * windows_.x_layout.dense_size(), T(0));
    windows_.for_positions(p.samples, [&](int64_t, int64_t x_dense, int64_t, int64_t y_dense, int64_t position) {
      const T* __restrict from = dy + y_dense;
      const T* __restrict taken = p.state + y_dense;
      T* __restrict to = dx + x_dense;
      const T here = static_cast<T>(position);
      for (int64_t c = 0; c < channels_; ++c) to[c] += taken[c] == here ? from[c] : T(0);
    });
  }

  const Windows windows_;
  const int64_t channels_;
};

template <class T>
class AveragePool final : public Layer<T> {
 public:
  AveragePool(const Node& node, const LayerContext<T>& context)
      : windows_(node, context.value(node.inputs[0]), context.value(node.output)),
        channels_(windows_.x_layout.stride),
        whole_windows_(node.flag) {}

  Reads reads() const override { return {.x = false, .dy = false, .x_tangent = false}; }

  void forward(const T*, const Primal<T>& p) override { average(p.samples, p.x[0], p.y); }
  void backward(const T*, const Primal<T>& p, T*) override { spread(p.samples, p.dy, p.dx[0]); }
  void forward_tangent(const T*, const T*, const Primal<T>& p, const Tangent<T>& t) override {
    average(p.samples, t.x[0], t.y);
  }
  void backward_tangent(const T*, const T*, const Primal<T>& p, const Tangent<T>& t, T*) override {
    spread(p.samples, t.dy, t.dx[0]);
  }

 private:
  void average(int64_t samples, const T* x, T* y) const {
    windows_.for_windows(samples, [&](int64_t to, int64_t, int64_t) { std::fill_n(y + to, channels_, T(0)); });
    windows_.for_positions(samples, [&](int64_t from, int64_t, int64_t to, int64_t, int64_t) {
      for (int64_t c = 0; c < channels_; ++c) y[to + c] += x[from + c];
    });
    windows_.for_windows(samples, [&](int64_t to, int64_t, int64_t valid) {
      const T share = 1 / divisor(valid);
      for (int64_t c = 0; c < channels_; ++c) y[to + c] *= share;
    });
  }

  void spread(int64_t samples, const T* dy, T* dx) {
    if (!dx) return;
    std::fill_n(dx, samples * windows_.x_layout.dense_size(), T(0));
    shares_.clear();
    windows_.for_windows(samples, [&](int64_t, int64_t, int64_t valid) { shares_.push_back(1 / divisor(valid)); });
    windows_.for_positions(samples, [&](int64_t, int64_t to, int64_t, int64_t from, int64_t) {
      const T share = shares_[static_cast<size_t>(from / channels_)];
      for (int64_t c = 0; c < channels_; ++c) dx[to + c] += share * dy[from + c];
    });
  }

  T divisor(int64_t valid) const {
    return static_cast<T>(whole_windows_ ? windows_.window.kernel_height * windows_.window.kernel_width : valid);
  }

  const Windows windows_;
  const int64_t channels_;
  const bool whole_windows_;  // padding counts
  std::vector<T> shares_;     // by window
};

}  // namespace

template <class T>
std::unique_ptr<Layer<T>> make_pool(const Node& node, const LayerContext<T>& context) {
  if (node.kind == Kind::max_pool) return std::make_unique<MaxPool<T>>(node, context);
  return std::make_unique<AveragePool<T>>(node, context);
}

template std::unique_ptr<Layer<float>> make_pool(const Node&, const LayerContext<float>&);
template std::unique_ptr<Layer<double>> make_pool(const Node&, const LayerContext<double>&);

}  // namespace innerloop::INNERLOOP_ISA
