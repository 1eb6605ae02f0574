// The arguments of coordinate_lstm and of its backward.
#pragma once

#include <optional>
#include <tuple>

#include "kernels/coordinate_lstm.h"
#include "ops/checks.h"

namespace innerloop {

// The tensors of a call, contiguous.
struct CoordinateLstmCall {
  Tensor gradients, state, first, second, output;
  int64_t steps, coordinates, hidden;
  double p;

  template <class T>
  CoordinateLstm<T> net() const {
    return {steps,
            coordinates,
            hidden,
            static_cast<T>(p),
            gradients.const_data_ptr<T>(),
            state.const_data_ptr<T>(),
            first.const_data_ptr<T>(),
            second.const_data_ptr<T>(),
            output.const_data_ptr<T>()};
  }
};

inline void check_state(const Tensor& state, const Tensor& gradients, int64_t hidden, const char* name) {
  check_floating(state, name);
  check_same_type(state, gradients, name);
  check_dims(state, 3, name);
  check_size(state, 0, 4, name);
  check_size(state, 1, hidden, name);
  check_size(state, 2, gradients.size(1), name);
}

inline CoordinateLstmCall checked_coordinate_lstm(const Tensor& gradients, const Tensor& state, const Tensor& first,
                                                  const Tensor& second, const Tensor& output, double p) {
  check_floating(gradients, "gradients");
  check_dims(gradients, 2, "gradients");
  check_floating(state, "state");
  check_dims(state, 3, "state");
  const int64_t hidden = state.size(1);
  STD_TORCH_CHECK(hidden > 0 && hidden <= 65536, "state has ", hidden, " hidden units, expected 1 to 65536");
  check_state(state, gradients, hidden, "state");
  for (const auto& [tensor, name, columns] :
       {std::tuple(first, "first", hidden + 3), std::tuple(second, "second", 2 * hidden + 1)}) {
    check_floating(tensor, name);
    check_same_type(tensor, gradients, name);
    check_dims(tensor, 2, name);
    check_size(tensor, 0, 4 * hidden, name);
    check_size(tensor, 1, columns, name);
  }
  check_floating(output, "output");
  check_same_type(output, gradients, "output");
  check_dims(output, 1, "output");
  check_size(output, 0, hidden + 1, "output");
  STD_TORCH_CHECK(p > 0, "p must be positive");
  return {torch::stable::contiguous(gradients),
          torch::stable::contiguous(state),
          torch::stable::contiguous(first),
          torch::stable::contiguous(second),
          torch::stable::contiguous(output),
          gradients.size(0),
          gradients.size(1),
          hidden,
          p};
}

struct UpdateGradients {
  Tensor updates;               // [K, C]
  std::optional<Tensor> state;  // [4, H, C]
};

inline UpdateGradients checked_update_gradients(const Tensor& updates, const std::optional<Tensor>& state,
                                                const CoordinateLstmCall& of) {
  check_floating(updates, "grad_updates");
  check_same_type(updates, of.gradients, "grad_updates");
  check_dims(updates, 2, "grad_updates");
  check_size(updates, 0, of.steps, "grad_updates");
  check_size(updates, 1, of.coordinates, "grad_updates");
  std::optional<Tensor> of_state;
  if (state) {
    check_state(*state, of.gradients, of.hidden, "grad_state");
    of_state = torch::stable::contiguous(*state);
  }
  return {torch::stable::contiguous(updates), of_state};
}

}  // namespace innerloop
