// coordinate_lstm: the steps of a learned optimizer for all coordinates of all tasks, and back-propagation through
// them.
#include "ops/coordinate_lstm.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "ops/parallel.h"

namespace innerloop {
namespace {

// Ranges of coordinates that threads share, at most this many: the weights' gradients are added up in their order, so
// that they are the same for any number of threads.
constexpr int64_t most_ranges = 64;
constexpr int64_t smallest_range = 256;

int64_t range_size(int64_t coordinates) {
  return std::max((coordinates + most_ranges - 1) / most_ranges, smallest_range);
}

// Calls work(range, begin, end) in parallel.
template <class Work>
void for_ranges(const CoordinateLstmCall& a, const Work& work) {
  const int64_t size = range_size(a.coordinates), ranges = (a.coordinates + size - 1) / size;
  torch::stable::parallel_for(0, ranges, 1, [&](int64_t from, int64_t to) {
    for (int64_t i = from; i < to; ++i) work(i, i * size, std::min((i + 1) * size, a.coordinates));
  });
}

// (updates [K, C], state [4, H, C])
std::tuple<Tensor, Tensor> coordinate_lstm_cpu(Tensor gradients, Tensor state, Tensor first, Tensor second,
                                               Tensor output, double p) {
  const CoordinateLstmCall a = checked_coordinate_lstm(gradients, state, first, second, output, p);
  Tensor updates = torch::stable::new_empty(a.gradients, {a.steps, a.coordinates});
  Tensor last = torch::stable::new_empty(a.state, {4, a.hidden, a.coordinates});
  for_type(a.gradients, [&]<class T>(T) {
    const CoordinateLstm<T> net = a.net<T>();
    T* to_updates = updates.mutable_data_ptr<T>();
    T* to_state = last.mutable_data_ptr<T>();
    for_ranges(a, [&](int64_t, int64_t begin, int64_t end) {
      INNERLOOP_CALL(coordinate_lstm, net, begin, end, to_updates, to_state);
    });
  });
  return {updates, last};
}

// The gradients of first, second and output; and, where of_inputs, of gradients [K, C] and state [4, H, C], which are
// empty otherwise.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> coordinate_lstm_backward_cpu(
    Tensor grad_updates, std::optional<Tensor> grad_state, Tensor gradients, Tensor state, Tensor first, Tensor second,
    Tensor output, double p, bool of_inputs) {
  const CoordinateLstmCall a = checked_coordinate_lstm(gradients, state, first, second, output, p);
  const auto [upstream, of_state] = checked_update_gradients(grad_updates, grad_state, a);
  Tensor to_first = torch::stable::new_empty(a.first, {4 * a.hidden, a.hidden + 3});
  Tensor to_second = torch::stable::new_empty(a.second, {4 * a.hidden, 2 * a.hidden + 1});
  Tensor to_output = torch::stable::new_empty(a.output, {a.hidden + 1});
  Tensor to_gradients = torch::stable::new_empty(a.gradients, {of_inputs ? a.steps : 0, of_inputs ? a.coordinates : 0});
  Tensor to_state =
      torch::stable::new_empty(a.state, {of_inputs ? 4 : 0, of_inputs ? a.hidden : 0, of_inputs ? a.coordinates : 0});
  const int64_t size = range_size(a.coordinates), ranges = (a.coordinates + size - 1) / size;
  const int64_t of_first = 4 * a.hidden * (a.hidden + 3), of_second = 4 * a.hidden * (2 * a.hidden + 1);
  const int64_t weights = of_first + of_second + a.hidden + 1;
  for_type(a.gradients, [&]<class T>(T) {
    const CoordinateLstm<T> net = a.net<T>();
    std::vector<T> sums(static_cast<size_t>(ranges * weights));
    const T* given = of_state ? of_state->const_data_ptr<T>() : nullptr;
    T* out_gradients = of_inputs ? to_gradients.mutable_data_ptr<T>() : nullptr;
    T* out_state = of_inputs ? to_state.mutable_data_ptr<T>() : nullptr;
    const T* of_updates = upstream.const_data_ptr<T>();
    for_ranges(a, [&](int64_t range, int64_t begin, int64_t end) {
      T* sum = sums.data() + range * weights;
      const CoordinateLstmGradients<T> of{of_updates,    given,    sum, sum + of_first, sum + of_first + of_second,
                                          out_gradients, out_state};
      INNERLOOP_CALL(coordinate_lstm_backward, net, begin, end, of);
    });
    int64_t offset = 0;
    for (auto [tensor, count] :
         {std::pair(to_first, of_first), std::pair(to_second, of_second), std::pair(to_output, a.hidden + 1)}) {
      T* to = tensor.template mutable_data_ptr<T>();
      std::fill_n(to, count, T(0));
      for (int64_t range = 0; range < ranges; ++range) {
        const T* sum = sums.data() + range * weights + offset;
        for (int64_t i = 0; i < count; ++i) to[i] += sum[i];
      }
      offset += count;
    }
  });
  return {to_first, to_second, to_output, to_gradients, to_state};
}

}  // namespace
}  // namespace innerloop

STABLE_TORCH_LIBRARY_FRAGMENT(innerloop, m) {
  m.def(
      "coordinate_lstm(Tensor gradients, Tensor state, Tensor first, Tensor second, Tensor output, float p)"
      " -> (Tensor, Tensor)");
  m.def(
      "coordinate_lstm_backward(Tensor grad_updates, Tensor? grad_state, Tensor gradients, Tensor state, Tensor first,"
      " Tensor second, Tensor output, float p, bool of_inputs) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(innerloop, CPU, m) {
  m.impl("coordinate_lstm", TORCH_BOX(&innerloop::coordinate_lstm_cpu));
  m.impl("coordinate_lstm_backward", TORCH_BOX(&innerloop::coordinate_lstm_backward_cpu));
}
