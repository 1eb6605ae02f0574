// What every op asks of its arguments before it reads memory. The checked functions of python/innerloop/ops have said
// the same in a user's words already; these keep a direct call of torch.ops.innerloop from harming the process.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstdint>

namespace innerloop {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline void check_floating(const Tensor& tensor, const char* name) {
  const ScalarType type = tensor.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Double, name, " must be float32 or float64");
  STD_TORCH_CHECK(tensor.is_cpu(), name, " must be a CPU tensor");
}

inline void check_dims(const Tensor& tensor, int64_t dims, const char* name) {
  STD_TORCH_CHECK(tensor.dim() == dims, name, " must have ", dims, " dimensions, it has ", tensor.dim());
}

inline void check_same_type(const Tensor& tensor, const Tensor& other, const char* name) {
  STD_TORCH_CHECK(tensor.scalar_type() == other.scalar_type(), name, " must have the other arguments' dtype");
}

inline void check_size(const Tensor& tensor, int64_t dim, int64_t size, const char* name) {
  STD_TORCH_CHECK(tensor.size(dim) == size, name, " has size ", tensor.size(dim), " in dimension ", dim, ", expected ",
                  size);
}

// labels [tasks, samples], contiguous: each -1 (no class) to classes - 1.
inline Tensor checked_labels(const Tensor& labels, int64_t tasks, int64_t samples, int64_t classes,
                             const char* name = "labels") {
  STD_TORCH_CHECK(labels.scalar_type() == ScalarType::Long && labels.is_cpu(), name, " must be an int64 CPU tensor");
  check_dims(labels, 2, name);
  check_size(labels, 0, tasks, name);
  check_size(labels, 1, samples, name);
  Tensor contiguous = torch::stable::contiguous(labels);
  const int64_t* label = contiguous.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < tasks * samples; ++i) {
    STD_TORCH_CHECK(label[i] >= -1 && label[i] < classes, name, " holds ", label[i], " in task ", i / samples,
                    ", expected 0 to ", classes - 1);
  }
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

// Iterations that make a thread worth its start: about 30,000 operations.
inline int64_t grain(int64_t operations_each) {
  return 1 + 30000 / (operations_each + 1);
}

// Calls work(task, first, last) for blocks of 0 … count-1 in every task, in parallel: one large task is shared by the
// threads too, and the blocks do not depend on how many there are.
template <class Work>
void for_blocks(int64_t tasks, int64_t count, int64_t block, int64_t operations_each, const Work& work) {
  const int64_t blocks = (count + block - 1) / block;
  torch::stable::parallel_for(0, tasks * blocks, grain(block * operations_each), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i % blocks * block;
      work(i / blocks, first, std::min(first + block, count));
    }
  });
}

constexpr int64_t rows_a_block = 120;     // of distances
constexpr int64_t columns_a_block = 512;  // of their gradient; whole vectors

}  // namespace innerloop
