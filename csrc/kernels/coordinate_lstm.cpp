// The lane is the coordinate: a row of the memory below holds one unit of a block of coordinates, step after step, so
// that gates are products of the weights with such rows, and no hidden size need be padded.
#include "kernels/coordinate_lstm.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "kernels/gemm.h"
#include "kernels/sigmoid.h"

namespace innerloop::INNERLOOP_ISA {
namespace {

// What a block of coordinates holds of every step; slots are `width` columns of every row. Going back needs the slots
// of all steps; going forward alone, one slot that every step writes to anew.
template <class T>
class Block {
 public:
  Block(const CoordinateLstm<T>& net, int64_t columns, bool keeps)
      : net_(net),
        hidden_(net.hidden),
        width_(columns),
        stride_(keeps ? columns : 0),
        // A row a cache line longer than its slots: rows a power of two apart would share a few lines of the cache.
        row_(columns * (keeps ? net.steps + 1 : 1) + 64 / static_cast<int64_t>(sizeof(T))),
        memory_(static_cast<size_t>(row_ * rows())) {
    T* next = memory_.data();
    for (auto [part, count] :
         {std::pair(&in1_, hidden_ + 3), std::pair(&in2_, 2 * hidden_ + 1), std::pair(&gates1_, 4 * hidden_),
          std::pair(&gates2_, 4 * hidden_), std::pair(&cell1_, hidden_), std::pair(&cell2_, hidden_),
          std::pair(&tanh1_, hidden_), std::pair(&tanh2_, hidden_), std::pair(&upstream_, int64_t{1})}) {
      *part = next;
      next += count * row_;
    }
    std::fill_n(in1_ + (hidden_ + 2) * row_, row_, T(1));
    std::fill_n(in2_ + 2 * hidden_ * row_, row_, T(1));
  }

  // All steps of coordinates first … first + count - 1; updates may be null.
  void forward(int64_t first, int64_t count, T* updates) {
    first_ = first;
    count_ = count;
    T* const states[] = {in1_ + 2 * row_, cell1_, in2_ + hidden_ * row_, cell2_};
    for (int64_t part = 0; part < 4; ++part) load_state(net_.state, part, states[part], row_);
    for (int64_t k = 0; k < net_.steps; ++k) {
      const int64_t now = k * stride_, next = now + stride_;
      preprocess(net_.gradients + k * net_.coordinates + first, in1_ + now);
      const ProductShape shape{4 * hidden_, hidden_ + 3, width_, hidden_ + 3, 1, row_, row_};
      multiply<T>(shape, {{net_.first, in1_ + now}}, nullptr, gates1_ + now);
      cells(gates1_ + now, cell1_ + now, cell1_ + next, tanh1_ + now, in2_ + now, in1_ + 2 * row_ + next);
      const ProductShape above{4 * hidden_, 2 * hidden_ + 1, width_, 2 * hidden_ + 1, 1, row_, row_};
      multiply<T>(above, {{net_.second, in2_ + now}}, nullptr, gates2_ + now);
      T* h2 = in2_ + hidden_ * row_ + next;
      cells(gates2_ + now, cell2_ + now, cell2_ + next, tanh2_ + now, h2, nullptr);
      if (updates != nullptr) read_out(h2, updates + k * net_.coordinates + first);
    }
  }

  // After forward: the last state.
  void store_state(T* to) const {
    const int64_t last = net_.steps * stride_;
    const T* const states[] = {in1_ + 2 * row_ + last, cell1_ + last, in2_ + hidden_ * row_ + last, cell2_ + last};
    for (int64_t part = 0; part < 4; ++part) save_state(states[part], row_, to, part);
  }

  // After forward with all steps kept: their gradients. sums holds the weights' while they are added.
  void backward(const CoordinateLstmGradients<T>& g, std::vector<T>& sums) {
    std::vector<T> carried(static_cast<size_t>(4 * hidden_ * width_)), into(static_cast<size_t>(2 * hidden_ * width_));
    std::vector<T> into_gradient(static_cast<size_t>(2 * width_));
    const int64_t part = hidden_ * width_;
    T *h1 = carried.data(), *c1 = h1 + part, *h2 = c1 + part, *c2 = h2 + part;
    if (g.state != nullptr) {
      for (int64_t i = 0; i < 4; ++i) load_state(g.state, i, h1 + i * part, width_);
    }
    for (int64_t k = net_.steps - 1; k >= 0; --k) {
      const int64_t now = k * stride_;
      T* upstream = upstream_ + now;
      std::fill_n(upstream, width_, T(0));
      std::copy_n(g.updates + k * net_.coordinates + first_, count_, upstream);
      for (int64_t j = 0; j < hidden_; ++j) {
        const Vector<T> weight = broadcast(net_.output[j]);
        for (int64_t b = 0; b < width_; b += lanes<T>) {
          store(h2 + j * width_ + b, load(h2 + j * width_ + b) + weight * load(upstream + b));
        }
      }
      cells_backward(gates2_ + now, cell2_ + now, tanh2_ + now, h2, c2);
      const ProductShape above{2 * hidden_, 4 * hidden_, width_, 1, 2 * hidden_ + 1, row_, width_};
      multiply<T>(above, {{net_.second, gates2_ + now}}, nullptr, into.data());
      for (int64_t i = 0; i < part; i += lanes<T>) store(h1 + i, load(h1 + i) + load(into.data() + i));
      std::copy_n(into.data() + part, part, h2);
      cells_backward(gates1_ + now, cell1_ + now, tanh1_ + now, h1, c1);
      const ProductShape shape{hidden_, 4 * hidden_, width_, 1, hidden_ + 3, row_, width_};
      multiply<T>(shape, {{net_.first + 2, gates1_ + now}}, nullptr, h1);
      if (g.gradients != nullptr) {
        const ProductShape two{2, 4 * hidden_, width_, 1, hidden_ + 3, row_, width_};
        multiply<T>(two, {{net_.first, gates1_ + now}}, nullptr, into_gradient.data());
        const int64_t place = k * net_.coordinates + first_;
        preprocess_backward(net_.gradients + place, into_gradient.data(), g.gradients + place);
      }
    }
    if (g.start != nullptr) {
      for (int64_t i = 0; i < 4; ++i) save_state(h1 + i * part, width_, g.start, i);
    }
    const int64_t columns = net_.steps * width_;
    add_products(4 * hidden_, hidden_ + 3, columns, gates1_, in1_, sums, g.first);
    add_products(4 * hidden_, 2 * hidden_ + 1, columns, gates2_, in2_, sums, g.second);
    add_products(1, hidden_ + 1, columns, upstream_, in2_ + hidden_ * row_ + stride_, sums, g.output);
  }

 private:
  int64_t rows() const { return 3 + 15 * hidden_ + 2; }

  void load_state(const T* state, int64_t part, T* to, int64_t row) const {
    for (int64_t j = 0; j < hidden_; ++j) {
      const T* from = state + (part * hidden_ + j) * net_.coordinates + first_;
      std::fill(std::copy_n(from, count_, to + j * row), to + j * row + width_, T(0));
    }
  }

  void save_state(const T* from, int64_t row, T* state, int64_t part) const {
    for (int64_t j = 0; j < hidden_; ++j) {
      std::copy_n(from + j * row, count_, state + (part * hidden_ + j) * net_.coordinates + first_);
    }
  }

  bool is_large(T gradient) const { return std::abs(gradient) >= std::exp(-net_.p); }

  // (log|g| / p, sign g) of a large gradient, (−1, eᵖ g) of a small one (the paper's appendix A).
  void preprocess(const T* gradients, T* to) const {
    T *size = to, *sign = to + row_;
    for (int64_t b = 0; b < count_; ++b) {
      const T g = gradients[b];
      const bool large = is_large(g);
      size[b] = large ? std::log(std::abs(g)) / net_.p : T(-1);
      sign[b] = large ? std::copysign(T(1), g) : std::exp(net_.p) * g;
    }
    for (int64_t b = count_; b < width_; ++b) size[b] = sign[b] = 0;
  }

  void preprocess_backward(const T* gradients, const T* upstream, T* to) const {
    for (int64_t b = 0; b < count_; ++b) {
      const T g = gradients[b];
      to[b] = is_large(g) ? upstream[b] / (net_.p * g) : upstream[width_ + b] * std::exp(net_.p);
    }
  }

  // c = σ(f) c′ + σ(i) tanh(g), h = σ(o) tanh(c); the gates are replaced by their activations. also: a second place for
  // h, or null.
  [[gnu::noinline]] void cells(T* gates, const T* before, T* cell, T* tanh_of_cell, T* h, T* also) const {
    const int64_t gate = hidden_ * row_;
    for (int64_t j = 0; j < hidden_; ++j) {
      for (int64_t b = 0; b < width_; b += lanes<T>) {
        const int64_t at = j * row_ + b;
        const Vector<T> i = sigmoid<T>(load(gates + at)), f = sigmoid<T>(load(gates + gate + at));
        const Vector<T> g = tanh_of(load(gates + 2 * gate + at)), o = sigmoid<T>(load(gates + 3 * gate + at));
        store(gates + at, i);
        store(gates + gate + at, f);
        store(gates + 2 * gate + at, g);
        store(gates + 3 * gate + at, o);
        const Vector<T> c = f * load(before + at) + i * g, t = tanh_of(c);
        store(cell + at, c);
        store(tanh_of_cell + at, t);
        store(h + at, o * t);
        if (also != nullptr) store(also + at, o * t);
      }
    }
  }

  // From the gradients of h and c [hidden][width] that of the gates before their activation, in the place of these, and
  // of c′, in the place of c's.
  [[gnu::noinline]] void cells_backward(T* gates, const T* before, const T* tanh_of_cell, const T* dh, T* dc) const {
    const int64_t gate = hidden_ * row_;
    for (int64_t j = 0; j < hidden_; ++j) {
      for (int64_t b = 0; b < width_; b += lanes<T>) {
        const int64_t at = j * row_ + b, carried = j * width_ + b;
        const Vector<T> i = load(gates + at), f = load(gates + gate + at);
        const Vector<T> g = load(gates + 2 * gate + at), o = load(gates + 3 * gate + at);
        const Vector<T> t = load(tanh_of_cell + at), of_h = load(dh + carried);
        const Vector<T> of_c = load(dc + carried) + of_h * o * (1 - t * t);
        store(gates + at, of_c * g * i * (1 - i));
        store(gates + gate + at, of_c * load(before + at) * f * (1 - f));
        store(gates + 2 * gate + at, of_c * i * (1 - g * g));
        store(gates + 3 * gate + at, of_h * t * o * (1 - o));
        store(dc + carried, of_c * f);
      }
    }
  }

  void read_out(const T* h2, T* updates) const {
    for (int64_t b = 0; b < width_; b += lanes<T>) {
      Vector<T> total = broadcast(net_.output[hidden_]);
      for (int64_t j = 0; j < hidden_; ++j) total += net_.output[j] * load(h2 + j * row_ + b);
      for (int64_t i = b; i < std::min(b + lanes<T>, count_); ++i) updates[i] = total[i - b];
    }
  }

  // out [a_rows][b_rows] += the inner products of the rows of a and b.
  void add_products(int64_t a_rows, int64_t b_rows, int64_t columns, const T* a, const T* b, std::vector<T>& sums,
                    T* out) const {
    sums.resize(static_cast<size_t>(a_rows * b_rows));
    multiply_rows<T>(a_rows, b_rows, columns, a, row_, b, row_, T(0), sums.data(), b_rows);
    for (int64_t i = 0; i < a_rows * b_rows; ++i) out[i] += sums[static_cast<size_t>(i)];
  }

  const CoordinateLstm<T>& net_;
  int64_t hidden_, width_, stride_, row_, first_ = 0, count_ = 0;
  std::vector<T> memory_;
  T *in1_, *in2_;        // a layer's inputs: its input, its hidden state, 1
  T *gates1_, *gates2_;  // and later their gradients
  T *cell1_, *cell2_, *tanh1_, *tanh2_;
  T* upstream_;  // the updates' gradients
};

template <class T>
void run(const CoordinateLstm<T>& net, int64_t begin, int64_t end, T* updates, T* state) {
  constexpr int64_t width = 4 * lanes<T>;  // all of a step stays in the nearest cache
  Block<T> block(net, width, false);
  for (int64_t first = begin; first < end; first += width) {
    block.forward(first, std::min(width, end - first), updates);
    block.store_state(state);
  }
}

template <class T>
void run_backward(const CoordinateLstm<T>& net, int64_t begin, int64_t end, const CoordinateLstmGradients<T>& g) {
  // As many columns, over all steps, as make the sums of the weights' gradients long, and stay in the second cache.
  constexpr int64_t columns = 512, tile = 2 * lanes<T>;
  const int64_t width = std::clamp(columns / std::max<int64_t>(net.steps, 1) / tile, int64_t{1}, 256 / tile) * tile;
  Block<T> block(net, width, true);
  std::vector<T> sums;
  for (int64_t first = begin; first < end; first += width) {
    block.forward(first, std::min(width, end - first), nullptr);
    block.backward(g, sums);
  }
}

}  // namespace

#define INNERLOOP_DEFINE(T)                                                                              \
  void coordinate_lstm(const CoordinateLstm<T>& net, int64_t begin, int64_t end, T* updates, T* state) { \
    run(net, begin, end, updates, state);                                                                \
  }                                                                                                      \
  void coordinate_lstm_backward(const CoordinateLstm<T>& net, int64_t begin, int64_t end,                \
                                const CoordinateLstmGradients<T>& gradients) {                           \
    run_backward(net, begin, end, gradients);                                                            \
  }
INNERLOOP_DEFINE(float)
INNERLOOP_DEFINE(double)

}  // namespace innerloop::INNERLOOP_ISA
