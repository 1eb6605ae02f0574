// inner_update on CUDA: the tensors of all parameters in one launch for every 64.
#include <algorithm>
#include <cstdint>
#include <vector>

#include "cuda/launch.h"
#include "ops/inner_update.h"

namespace innerloop {
namespace {

constexpr size_t tensors_a_launch = 64;  // 64 × 48 bytes of kernel arguments, within the 4 KiB that a launch may pass

template <class T>
struct Update {
  const T* param;
  const T* grad;
  const T* lr;
  T* updated;
  int64_t count;
  int64_t lr_stride;  // 0: one rate for the tensor
};

template <class T>
struct Updates {
  Update<T> each[tensors_a_launch];
};

// blockIdx.y is the tensor; the blocks of x stride over its elements.
template <class T>
__global__ void inner_update_kernel(const Updates<T> updates) {
  const Update<T> u = updates.each[blockIdx.y];
  const int64_t step = int64_t{blockDim.x} * gridDim.x;
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < u.count; i += step) {
    u.updated[i] = u.param[i] - u.lr[i * u.lr_stride] * u.grad[i];
  }
}

// The tensors of type T among those of a call.
template <class T>
void update(const Device& device, InnerUpdate& call, ScalarType type) {
  Updates<T> updates{};
  size_t held = 0;
  int64_t largest = 0;
  const auto launch = [&] {
    dim3 grid = grid_for(largest);
    grid.y = static_cast<unsigned>(held);
    device.launch(inner_update_kernel<T>, grid, threads_a_block, 0, updates);
    held = 0;
    largest = 0;
  };
  for (size_t i = 0; i < call.params.size(); ++i) {
    if (call.params[i].scalar_type() != type) continue;
    const int64_t count = call.params[i].numel(), lr_stride = call.lrs[i].numel() == 1 ? 0 : 1;
    updates.each[held++] = {call.params[i].const_data_ptr<T>(),
                            call.grads[i].const_data_ptr<T>(),
                            call.lrs[i].const_data_ptr<T>(),
                            call.updated[i].mutable_data_ptr<T>(),
                            count,
                            lr_stride};
    largest = std::max(largest, count);
    if (held == tensors_a_launch) launch();
  }
  launch();
}

std::vector<Tensor> inner_update_cuda(std::vector<Tensor> params, std::vector<Tensor> grads, std::vector<Tensor> lrs) {
  InnerUpdate call = checked_inner_update(params, grads, lrs);
  if (params.empty()) return {};
  const Device device(params[0], "inner_update");
  update<float>(device, call, ScalarType::Float);
  update<double>(device, call, ScalarType::Double);
  return call.updated;
}

}  // namespace
}  // namespace innerloop

INNERLOOP_CUDA_OPS(m) {
  m.impl("inner_update", TORCH_BOX(&innerloop::inner_update_cuda));
}
