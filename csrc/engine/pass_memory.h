// The memory of passes through the blocks executor.
#pragma once

#include <memory>
#include <vector>

#include "engine/memory.h"
#include "engine/pass.h"
#include "engine/plan.h"

namespace innerloop::INNERLOOP_ISA {

// Takes it for one task at a time.
template <class T>
class PassMemory {
 public:
  PassMemory(const Plan& plan, const std::vector<std::unique_ptr<Layer<T>>>& layers, Memory<T>& memory)
      : plan_(plan), layers_(layers), memory_(memory) {}

  T* value(size_t value, int64_t samples) const { return memory_.take(samples * plan_.values[value].sample_size()); }
  T* gradient(size_t value, int64_t samples) const { return memory_.take(samples * plan_.values[value].dense_size()); }
  T* state(size_t step, int64_t samples) const { return memory_.take(layers_[step]->state_size(samples)); }
  T* tangent_state(size_t step, int64_t samples) const {
    return memory_.take(layers_[step]->tangent_state_size(samples));
  }

 private:
  const Plan& plan_;
  const std::vector<std::unique_ptr<Layer<T>>>& layers_;
  Memory<T>& memory_;
};

// Takes none, and counts what the first would take.
template <class T>
class PassSize {
 public:
  PassSize(const Plan& plan, const std::vector<std::unique_ptr<Layer<T>>>& layers) : plan_(plan), layers_(layers) {}

  T* value(size_t value, int64_t samples) const { return count(samples * plan_.values[value].sample_size()); }
  T* gradient(size_t value, int64_t samples) const { return count(samples * plan_.values[value].dense_size()); }
  T* state(size_t step, int64_t samples) const { return count(layers_[step]->state_size(samples)); }

  int64_t numbers() const { return numbers_; }

 private:
  T* count(int64_t numbers) const {
    numbers_ += numbers;
    return nullptr;
  }

  const Plan& plan_;
  const std::vector<std::unique_ptr<Layer<T>>>& layers_;
  mutable int64_t numbers_ = 0;
};

}  // namespace innerloop::INNERLOOP_ISA
