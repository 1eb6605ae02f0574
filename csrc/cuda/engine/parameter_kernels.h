// What the recurrence does to parameters, of all of them and all tasks of a chunk in one launch for every 48.
#pragma once

#include <cstdint>
#include <vector>

#include "cuda/launch.h"

namespace innerloop::gpu {

// One parameter: arrays [tasks][size]. What each operation reads of it is said there.
template <class T>
struct Operand {
  T* to = nullptr;
  const T* from = nullptr;
  const T* other = nullptr;
  const T* initial = nullptr;
  const T* rate = nullptr;  // α: one number, or [size]
  int64_t size = 0;
  bool per_element = false;  // α
  bool is_shared = false;    // `from` is [size]: all tasks have the same
};

template <class T>
class ParameterKernels {
 public:
  explicit ParameterKernels(const Device& device) : device_(device) {}

  using Operands = std::vector<Operand<T>>;

  // to = from
  void load(int64_t tasks, const Operands& operands) const;
  // to = 0
  void clear(int64_t tasks, const Operands& operands) const;
  // to = from − α ⊙ other − α λ (from − initial)
  void descend(int64_t tasks, T proximal, const Operands& operands) const;
  // to = −α ⊙ from
  void scale_by_rate(int64_t tasks, const Operands& operands) const;
  // to += u from
  void add(int64_t tasks, T u, const Operands& operands) const;
  // to = u from
  void scale(int64_t tasks, T u, const Operands& operands) const;
  // to [size] += the sum of from over tasks, in their order
  void add_tasks(int64_t tasks, const Operands& operands) const;
  // to [1 or size] −= from ⊙ other summed over what shares an α, task by task. scratch: a double for each task of each
  // operand.
  void subtract_rate_gradient(int64_t tasks, const Operands& operands, double* scratch) const;

 private:
  const Device& device_;
};

}  // namespace innerloop::gpu
