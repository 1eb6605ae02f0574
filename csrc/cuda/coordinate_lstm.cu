// coordinate_lstm on CUDA: a thread for each coordinate, which needs no other, through all steps in one launch; and
// back.
//
// Coordinates come in ranges, and a range has a memory of its own: a matrix whose rows hold one unit each, step after
// step, a column for each coordinate and step. So the weights' gradients are inner products of such rows. Each range's
// are made apart and then added up in their order, so that they are the same on every device.
#include <algorithm>
#include <optional>
#include <tuple>

#include "cuda/pair_sums.h"
#include "ops/coordinate_lstm.h"

namespace innerloop {
namespace {

constexpr int range = threads_a_block;               // coordinates
constexpr int64_t most_memory = int64_t{256} << 20;  // bytes that the ranges of a launch hold together

// Where a range's memory has what. A slot is what a row holds of one step; with two slots, steps take turns.
struct Layout {
  int64_t hidden, slots;
  bool goes_back;  // which needs a slot for each step, and the gates

  __host__ __device__ int64_t in1() const { return 0; }           // a layer's inputs: its input, its hidden
  __host__ __device__ int64_t in2() const { return hidden + 3; }  // state, 1
  __host__ __device__ int64_t cell1() const { return 3 * hidden + 4; }
  __host__ __device__ int64_t cell2() const { return cell1() + hidden; }
  __host__ __device__ int64_t gates1() const { return cell2() + hidden; }  // and later their gradients
  __host__ __device__ int64_t gates2() const { return gates1() + 4 * hidden; }
  __host__ __device__ int64_t upstream() const { return gates2() + 4 * hidden; }  // the updates' gradients
  __host__ __device__ int64_t carried() const { return upstream() + 1; }  // gradients of both states, in the first slot
  __host__ __device__ int64_t rows() const { return goes_back ? carried() + 4 * hidden : gates1(); }
  __host__ __device__ int64_t row() const { return slots * range; }
  __host__ __device__ int64_t size() const { return rows() * row(); }
};

// A coordinate's column in the memory of its range.
template <class T>
struct Column {
  T* data;
  int64_t row;

  __device__ T& at(int64_t of_row, int64_t slot) const { return data[of_row * row + slot * range]; }
};

template <class T>
__device__ T sigmoid(T x) {
  return 1 / (1 + std::exp(-x));
}

template <class T>
__device__ bool is_large(T gradient, T p) {
  return std::abs(gradient) >= std::exp(-p);
}

// One layer's step: cells and hidden states from weights [4 · hidden, inputs] and the inputs in slot now, whose last is
// 1. The new cell goes to slot next, the new hidden state there too and, where also is not negative, to the rows `also`
// in slot now. Gates are kept where gates is not negative.
template <class T>
__device__ void layer_step(const T* weights, int64_t hidden, int64_t inputs, Column<T> column, int64_t in,
                           int64_t state, int64_t cell, int64_t gates, int64_t also, int64_t now, int64_t next) {
  for (int64_t j = 0; j < hidden; ++j) {
    const T* w = weights + j * inputs;
    const int64_t gate = hidden * inputs;
    T i = 0, f = 0, g = 0, o = 0;
    for (int64_t r = 0; r < inputs; ++r) {
      const T x = column.at(in + r, now);
      i += w[r] * x;
      f += w[gate + r] * x;
      g += w[2 * gate + r] * x;
      o += w[3 * gate + r] * x;
    }
    i = sigmoid(i), f = sigmoid(f), g = std::tanh(g), o = sigmoid(o);
    const T c = f * column.at(cell + j, now) + i * g, h = o * std::tanh(c);
    column.at(cell + j, next) = c;
    column.at(state + j, next) = h;
    if (also >= 0) column.at(also + j, now) = h;
    if (gates >= 0) {
      column.at(gates + j, now) = i;
      column.at(gates + hidden + j, now) = f;
      column.at(gates + 2 * hidden + j, now) = g;
      column.at(gates + 3 * hidden + j, now) = o;
    }
  }
}

// All steps of coordinate c; of one beyond the last, there is false, zeros go in and nothing out. updates may be null.
template <class T>
__device__ void forward(const CoordinateLstm<T>& net, const Layout& at, Column<T> column, int64_t c, bool there,
                        T* updates) {
  const int64_t H = net.hidden, C = net.coordinates;
  const int64_t parts[] = {at.in1() + 2, at.cell1(), at.in2() + H, at.cell2()};
  for (int part = 0; part < 4; ++part) {
    for (int64_t j = 0; j < H; ++j) column.at(parts[part] + j, 0) = there ? net.state[(part * H + j) * C + c] : T(0);
  }
  for (int64_t slot = 0; slot < at.slots; ++slot) {
    column.at(at.in1() + H + 2, slot) = 1;
    column.at(at.in2() + 2 * H, slot) = 1;
  }
  for (int64_t k = 0; k < net.steps; ++k) {
    const int64_t now = k % at.slots, next = (k + 1) % at.slots;
    const T gradient = there ? net.gradients[k * C + c] : T(0);
    const bool large = is_large(gradient, net.p);
    column.at(at.in1(), now) = large ? std::log(std::abs(gradient)) / net.p : T(-1);
    column.at(at.in1() + 1, now) = large ? std::copysign(T(1), gradient) : std::exp(net.p) * gradient;
    layer_step(net.first, H, H + 3, column, at.in1(), at.in1() + 2, at.cell1(),
               at.goes_back ? at.gates1() : int64_t{-1}, at.in2(), now, next);
    layer_step(net.second, H, 2 * H + 1, column, at.in2(), at.in2() + H, at.cell2(),
               at.goes_back ? at.gates2() : int64_t{-1}, int64_t{-1}, now, next);
    if (updates == nullptr || !there) continue;
    T update = net.output[H];
    for (int64_t j = 0; j < H; ++j) update += net.output[j] * column.at(at.in2() + H + j, next);
    updates[k * C + c] = update;
  }
}

// From the gradients of a layer's hidden state and cell after step `now`, in the rows dh and dc: the gates' before
// their activation, in their place, and the cell's before the step, in dc.
template <class T>
__device__ void cells_backward(int64_t hidden, Column<T> column, int64_t cell, int64_t gates, int64_t dh, int64_t dc,
                               int64_t now) {
  for (int64_t j = 0; j < hidden; ++j) {
    T& of_i = column.at(gates + j, now);
    T& of_f = column.at(gates + hidden + j, now);
    T& of_g = column.at(gates + 2 * hidden + j, now);
    T& of_o = column.at(gates + 3 * hidden + j, now);
    const T i = of_i, f = of_f, g = of_g, o = of_o, t = std::tanh(column.at(cell + j, now + 1));
    const T of_h = column.at(dh + j, 0), of_c = column.at(dc + j, 0) + of_h * o * (1 - t * t);
    of_i = of_c * g * i * (1 - i);
    of_f = of_c * column.at(cell + j, now) * f * (1 - f);
    of_g = of_c * i * (1 - g * g);
    of_o = of_h * t * o * (1 - o);
    column.at(dc + j, 0) = of_c * f;
  }
}

// What the gates' gradients in slot now give input r of a layer.
template <class T>
__device__ T into_input(const T* weights, int64_t hidden, int64_t inputs, Column<T> column, int64_t gates, int64_t r,
                        int64_t now) {
  T sum = 0;
  for (int64_t q = 0; q < 4 * hidden; ++q) sum += weights[q * inputs + r] * column.at(gates + q, now);
  return sum;
}

// After forward with a slot for each step.
template <class T>
__device__ void backward(const CoordinateLstm<T>& net, const Layout& at, Column<T> column, int64_t c, bool there,
                         const CoordinateLstmGradients<T>& g) {
  const int64_t H = net.hidden, C = net.coordinates;
  const int64_t h1 = at.carried(), c1 = h1 + H, h2 = c1 + H, c2 = h2 + H;
  for (int64_t r = 0; r < 4 * H; ++r) {
    column.at(h1 + r, 0) = there && g.state != nullptr ? g.state[r * C + c] : T(0);
  }
  for (int64_t k = net.steps - 1; k >= 0; --k) {
    const T upstream = there ? g.updates[k * C + c] : T(0);
    column.at(at.upstream(), k) = upstream;
    for (int64_t j = 0; j < H; ++j) column.at(h2 + j, 0) += net.output[j] * upstream;
    cells_backward(H, column, at.cell2(), at.gates2(), h2, c2, k);
    for (int64_t j = 0; j < H; ++j) {
      column.at(h1 + j, 0) += into_input(net.second, H, 2 * H + 1, column, at.gates2(), j, k);
      column.at(h2 + j, 0) = into_input(net.second, H, 2 * H + 1, column, at.gates2(), H + j, k);
    }
    cells_backward(H, column, at.cell1(), at.gates1(), h1, c1, k);
    for (int64_t j = 0; j < H; ++j) {
      column.at(h1 + j, 0) = into_input(net.first, H, H + 3, column, at.gates1(), 2 + j, k);
    }
    if (g.gradients == nullptr || !there) continue;
    const T gradient = net.gradients[k * C + c];
    g.gradients[k * C + c] = is_large(gradient, net.p)
                                 ? into_input(net.first, H, H + 3, column, at.gates1(), 0, k) / (net.p * gradient)
                                 : into_input(net.first, H, H + 3, column, at.gates1(), 1, k) * std::exp(net.p);
  }
  if (g.start == nullptr || !there) return;
  for (int64_t r = 0; r < 4 * H; ++r) g.start[r * C + c] = column.at(h1 + r, 0);
}

// A block for each of the ranges first_range … first_range + ranges - 1. (For one block at a time: where ptxas makes
// room for more, it spills registers for some architectures.)
template <class T>
__global__ void __launch_bounds__(range, 1)
    coordinate_lstm_kernel(const CoordinateLstm<T> net, const Layout layout, int64_t first_range, int64_t ranges,
                           T* memory, T* updates, T* last) {
  const int64_t H = net.hidden, slot = net.steps % layout.slots;
  for (int64_t i = blockIdx.x; i < ranges; i += gridDim.x) {
    const int64_t c = (first_range + i) * range + threadIdx.x;
    const bool there = c < net.coordinates;
    const Column<T> column{memory + i * layout.size() + threadIdx.x, layout.row()};
    forward(net, layout, column, c, there, updates);
    if (!there) continue;
    const int64_t parts[] = {layout.in1() + 2, layout.cell1(), layout.in2() + H, layout.cell2()};
    for (int part = 0; part < 4; ++part) {
      for (int64_t j = 0; j < H; ++j) last[(part * H + j) * net.coordinates + c] = column.at(parts[part] + j, slot);
    }
  }
}

// The same; leaves what the weights' gradients are made of in the ranges' memory.
template <class T>
__global__ void __launch_bounds__(range, 1)
    coordinate_lstm_backward_kernel(const CoordinateLstm<T> net, const Layout layout, int64_t first_range,
                                    int64_t ranges, T* memory, const CoordinateLstmGradients<T> gradients) {
  T* no_updates = nullptr;
  for (int64_t i = blockIdx.x; i < ranges; i += gridDim.x) {
    const int64_t c = (first_range + i) * range + threadIdx.x;
    const bool there = c < net.coordinates;
    const Column<T> column{memory + i * layout.size() + threadIdx.x, layout.row()};
    forward(net, layout, column, c, there, no_updates);
    backward(net, layout, column, c, there, gradients);
  }
}

// Adds parts [ranges, count] to what is in to [count], in their order.
template <class T>
__global__ void add_ranges_kernel(const T* parts, int64_t ranges, int64_t count, T* to) {
  const int64_t step = int64_t{blockDim.x} * gridDim.x;
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < count; i += step) {
    T sum = to[i];
    for (int64_t r = 0; r < ranges; ++r) sum += parts[r * count + i];
    to[i] = sum;
  }
}

// Calls work(first range, ranges) for as many ranges at a time as most_memory holds.
template <class Work>
void for_ranges(int64_t coordinates, int64_t bytes_a_range, const Work& work) {
  const int64_t ranges = (coordinates + range - 1) / range;
  const int64_t most = std::clamp(most_memory / bytes_a_range, int64_t{1}, std::max(ranges, int64_t{1}));
  for (int64_t first = 0; first < ranges; first += most) work(first, std::min(most, ranges - first));
}

// (updates [K, C], state [4, H, C])
std::tuple<Tensor, Tensor> coordinate_lstm_cuda(Tensor gradients, Tensor state, Tensor first, Tensor second,
                                                Tensor output, double p) {
  const CoordinateLstmCall a = checked_coordinate_lstm(gradients, state, first, second, output, p);
  const Device device(a.gradients, "coordinate_lstm");
  const Layout layout{a.hidden, 2, false};
  Tensor updates = torch::stable::new_empty(a.gradients, {a.steps, a.coordinates});
  Tensor last = torch::stable::new_empty(a.state, {4, a.hidden, a.coordinates});
  for_type(a.gradients, [&]<class T>(T) {
    for_ranges(a.coordinates, layout.size() * static_cast<int64_t>(sizeof(T)), [&](int64_t begin, int64_t ranges) {
      Tensor memory = torch::stable::new_empty(a.gradients, {ranges * layout.size()});
      device.launch(coordinate_lstm_kernel<T>, grid_for(ranges, 1), range, 0, a.net<T>(), layout, begin, ranges,
                    memory.mutable_data_ptr<T>(), updates.mutable_data_ptr<T>(), last.mutable_data_ptr<T>());
    });
  });
  return {updates, last};
}

// The gradients of first, second and output; and, where of_inputs, of gradients [K, C] and state [4, H, C], which are
// empty otherwise.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> coordinate_lstm_backward_cuda(
    Tensor grad_updates, std::optional<Tensor> grad_state, Tensor gradients, Tensor state, Tensor first, Tensor second,
    Tensor output, double p, bool of_inputs) {
  const CoordinateLstmCall a = checked_coordinate_lstm(gradients, state, first, second, output, p);
  const UpdateGradients upstream = checked_update_gradients(grad_updates, grad_state, a);
  const Device device(a.gradients, "coordinate_lstm_backward");
  const int64_t H = a.hidden;
  const Layout layout{H, a.steps + 1, true};
  Tensor to_first = torch::stable::new_zeros(a.first, {4 * H, H + 3});
  Tensor to_second = torch::stable::new_zeros(a.second, {4 * H, 2 * H + 1});
  Tensor to_output = torch::stable::new_zeros(a.output, {H + 1});
  Tensor to_gradients = torch::stable::new_empty(a.gradients, {of_inputs ? a.steps : 0, of_inputs ? a.coordinates : 0});
  Tensor to_state =
      torch::stable::new_empty(a.state, {of_inputs ? 4 : 0, of_inputs ? H : 0, of_inputs ? a.coordinates : 0});
  for_type(a.gradients, [&]<class T>(T) {
    const CoordinateLstmGradients<T> of{upstream.updates.const_data_ptr<T>(),
                                        upstream.state ? upstream.state->const_data_ptr<T>() : nullptr,
                                        nullptr,
                                        nullptr,
                                        nullptr,
                                        of_inputs ? to_gradients.mutable_data_ptr<T>() : nullptr,
                                        of_inputs ? to_state.mutable_data_ptr<T>() : nullptr};
    for_ranges(a.coordinates, layout.size() * static_cast<int64_t>(sizeof(T)), [&](int64_t begin, int64_t ranges) {
      Tensor memory = torch::stable::new_empty(a.gradients, {ranges * layout.size()});
      T* data = memory.mutable_data_ptr<T>();
      device.launch(coordinate_lstm_backward_kernel<T>, grid_for(ranges, 1), range, 0, a.net<T>(), layout, begin,
                    ranges, data, of);
      // The columns of all steps of rows, in a slot for each: those of the step, or of the one after it.
      const auto rows = [&](int64_t from, int64_t count, int64_t slot) {
        return Rows<T>{data + from * layout.row() + slot * range, count, layout.row(), layout.size()};
      };
      const auto add = [&](Rows<T> gates, Rows<T> inputs, Tensor& to) {
        const int64_t count = gates.count * inputs.count;
        Tensor parts = torch::stable::new_empty(a.gradients, {ranges, count});
        pair_sums<Product>(device, gates, inputs, ranges, a.steps * range, T(1), parts.mutable_data_ptr<T>());
        device.launch(add_ranges_kernel<T>, grid_for(count), threads_a_block, 0, parts.const_data_ptr<T>(), ranges,
                      count, to.mutable_data_ptr<T>());
      };
      add(rows(layout.gates1(), 4 * H, 0), rows(layout.in1(), H + 3, 0), to_first);
      add(rows(layout.gates2(), 4 * H, 0), rows(layout.in2(), 2 * H + 1, 0), to_second);
      add(rows(layout.upstream(), 1, 0), rows(layout.in2() + H, H + 1, 1), to_output);
    });
  });
  return {to_first, to_second, to_output, to_gradients, to_state};
}

}  // namespace
}  // namespace innerloop

INNERLOOP_CUDA_OPS(m) {
  m.impl("coordinate_lstm", TORCH_BOX(&innerloop::coordinate_lstm_cuda));
  m.impl("coordinate_lstm_backward", TORCH_BOX(&innerloop::coordinate_lstm_backward_cuda));
}
