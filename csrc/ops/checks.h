// What every op asks of its arguments before it reads memory. The checked functions of python/innerloop/ops have said
// the same in a user's words already; these keep a direct call of torch.ops.innerloop from harming the process.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>

namespace innerloop {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// The kernels of csrc/cuda are for CUDA tensors where nvcc compiles them (see cuda/launch.h), all others for CPU
// tensors.
#if defined(__CUDACC__)
constexpr const char* device_name = "CUDA";
inline bool is_on_device(const Tensor& tensor) {
  return tensor.is_cuda();
}
#else
constexpr const char* device_name = "CPU";
inline bool is_on_device(const Tensor& tensor) {
  return tensor.is_cpu();
}
#endif

inline void check_device(const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(is_on_device(tensor), name, " must be a ", device_name, " tensor");
}

inline void check_same_device(const Tensor& tensor, const Tensor& other, const char* name) {
  STD_TORCH_CHECK(tensor.get_device_index() == other.get_device_index(), name,
                  " must be on the other arguments' device");
}

inline void check_floating(const Tensor& tensor, const char* name) {
  const ScalarType type = tensor.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Double, name, " must be float32 or float64");
  check_device(tensor, name);
}

// With no elements, or with stride 0, a tensor may have so many tasks that a loop over them never ends.
constexpr int64_t largest_size = (int64_t{1} << 31) - 1;

inline void check_dims(const Tensor& tensor, int64_t dims, const char* name) {
  STD_TORCH_CHECK(tensor.dim() == dims, name, " must have ", dims, " dimensions, it has ", tensor.dim());
  for (int64_t dim = 0; dim < dims; ++dim) {
    STD_TORCH_CHECK(tensor.size(dim) <= largest_size, name, " has size ", tensor.size(dim), " in dimension ", dim,
                    ", expected at most ", largest_size);
  }
}

inline void check_same_type(const Tensor& tensor, const Tensor& other, const char* name) {
  STD_TORCH_CHECK(tensor.scalar_type() == other.scalar_type(), name, " must have the other arguments' dtype");
  check_same_device(tensor, other, name);
}

inline void check_size(const Tensor& tensor, int64_t dim, int64_t size, const char* name) {
  STD_TORCH_CHECK(tensor.size(dim) == size, name, " has size ", tensor.size(dim), " in dimension ", dim, ", expected ",
                  size);
}

// labels [tasks, samples] on the device of samples_of, contiguous. Their values are not looked at.
inline Tensor shaped_labels(const Tensor& labels, const Tensor& samples_of, int64_t tasks, int64_t samples,
                            const char* name = "labels") {
  STD_TORCH_CHECK(labels.scalar_type() == ScalarType::Long, name, " must be int64");
  check_device(labels, name);
  check_same_device(labels, samples_of, name);
  check_dims(labels, 2, name);
  check_size(labels, 0, tasks, name);
  check_size(labels, 1, samples, name);
  return torch::stable::contiguous(labels);
}

// Of contiguous labels on the CPU: each must be -1 (no class) to classes - 1.
inline void check_label_values(const Tensor& labels, int64_t classes, const char* name = "labels") {
  const int64_t* label = labels.const_data_ptr<int64_t>();
  const int64_t count = labels.numel();
  const auto is_class = [&](int64_t value) { return value >= -1 && value < classes; };
  bool all = true;  // first of all of them: a pass without a branch for each
  for (int64_t i = 0; i < count; ++i) all &= is_class(label[i]);
  for (int64_t i = 0; i < count && !all; ++i) {
    STD_TORCH_CHECK(is_class(label[i]), name, " holds ", label[i], " in task ", i / labels.size(1), ", expected 0 to ",
                    classes - 1);
  }
}

// Both, for the CPU ops.
inline Tensor checked_labels(const Tensor& labels, const Tensor& samples_of, int64_t tasks, int64_t samples,
                             int64_t classes, const char* name = "labels") {
  Tensor contiguous = shaped_labels(labels, samples_of, tasks, samples, name);
  check_label_values(contiguous, classes, name);
  return contiguous;
}

// Calls work(T{}) with T the tensor's type.
template <class Work>
void for_type(const Tensor& tensor, const Work& work) {
  if (tensor.scalar_type() == ScalarType::Double) {
    work(double{});
  } else {
    work(float{});
  }
}

}  // namespace innerloop
