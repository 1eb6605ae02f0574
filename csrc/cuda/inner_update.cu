// inner_update on CUDA: all parameters of all tasks in one launch for every 64 tensors.
// Compiled by every build that has nvcc; not yet run on a GPU.
#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstdint>
#include <vector>

namespace innerloop {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int tensors_a_launch = 64;  // 64 × 48 bytes of kernel arguments, within the 4 KiB that a launch may pass
constexpr int threads = 256;

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

template <class T>
void launch(const std::vector<Tensor>& params, const std::vector<Tensor>& grads, const std::vector<Tensor>& lrs,
            const std::vector<Tensor>& updated, size_t first, size_t last) {
  Updates<T> updates{};
  int64_t largest = 0;
  for (size_t i = first; i < last; ++i) {
    const int64_t count = params[i].numel();
    updates.each[i - first] = {params[i].const_data_ptr<T>(),
                               grads[i].const_data_ptr<T>(),
                               lrs[i].const_data_ptr<T>(),
                               updated[i].mutable_data_ptr<T>(),
                               count,
                               lrs[i].numel() == 1 ? int64_t{0} : int64_t{1}};
    largest = std::max(largest, count);
  }
  if (largest == 0) return;
  const auto blocks = static_cast<unsigned>(std::min<int64_t>((largest + threads - 1) / threads, 1024));
  const auto stream = static_cast<cudaStream_t>(
      torch::stable::accelerator::getCurrentStream(params[first].get_device_index()).nativeHandle());
  inner_update_kernel<T><<<dim3(blocks, static_cast<unsigned>(last - first)), threads, 0, stream>>>(updates);
  const cudaError_t error = cudaGetLastError();
  STD_TORCH_CHECK(error == cudaSuccess, "inner_update: ", cudaGetErrorString(error));
}

std::vector<Tensor> inner_update_cuda(std::vector<Tensor> params, std::vector<Tensor> grads, std::vector<Tensor> lrs) {
  STD_TORCH_CHECK(grads.size() == params.size() && lrs.size() == params.size(),
                  "params, grads and lrs must have the same number of tensors");
  std::vector<Tensor> updated;
  if (params.empty()) return updated;
  const ScalarType type = params[0].scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Double, "params must be float32 or float64");
  const torch::stable::accelerator::DeviceGuard guard(params[0].get_device_index());
  for (size_t i = 0; i < params.size(); ++i) {
    for (const Tensor* tensor : {&params[i], &grads[i], &lrs[i]}) {
      STD_TORCH_CHECK(tensor->is_cuda() && tensor->get_device_index() == params[0].get_device_index(),
                      "params, grads and lrs must be on one CUDA device");
      STD_TORCH_CHECK(tensor->scalar_type() == type, "params, grads and lrs must have one dtype");
    }
    STD_TORCH_CHECK(grads[i].sizes().equals(params[i].sizes()), "grads must have the shapes of params");
    STD_TORCH_CHECK(lrs[i].numel() == 1 || lrs[i].sizes().equals(params[i].sizes()),
                    "lrs must have one element, or the shapes of params");
    params[i] = torch::stable::contiguous(params[i]);
    grads[i] = torch::stable::contiguous(grads[i]);
    lrs[i] = torch::stable::contiguous(lrs[i]);
    updated.push_back(torch::stable::empty_like(params[i]));
  }
  for (size_t first = 0; first < params.size(); first += tensors_a_launch) {
    const size_t last = std::min(params.size(), first + tensors_a_launch);
    if (type == ScalarType::Double) {
      launch<double>(params, grads, lrs, updated, first, last);
    } else {
      launch<float>(params, grads, lrs, updated, first, last);
    }
  }
  return updated;
}

}  // namespace
}  // namespace innerloop

STABLE_TORCH_LIBRARY_IMPL(innerloop, CUDA, m) {
  m.impl("inner_update", TORCH_BOX(&innerloop::inner_update_cuda));
}
