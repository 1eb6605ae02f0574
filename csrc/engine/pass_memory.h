// The memory of passes through the blocks executor.
#pragma once

#include <algorithm>
#include <memory>
#include <vector>

#include "engine/memory.h"
#include "engine/pass.h"
#include "engine/plan.h"
#include "engine/walk_memory.h"

namespace innerloop::INNERLOOP_ISA {

// Takes it for one task at a time: for what is read after the walk that wrote it memory of its own, for the rest that
// of all walks.
template <class T>
class PassMemory {
 public:
  using WhatIsRead = bool Reads::*;

  // walk: null: all is read later. Else of a value is read what one of its readers says, of a gradient what its layer
  // says (null: nothing).
  PassMemory(const Plan& plan, const std::vector<std::unique_ptr<Layer<T>>>& layers, Memory<T>& memory,
             WalkMemory<T>* walk = nullptr, WhatIsRead of_values = nullptr, WhatIsRead of_gradients = nullptr)
      : plan_(plan),
        layers_(layers),
        memory_(memory),
        walk_(walk),
        of_values_(of_values),
        of_gradients_(of_gradients) {}

  T* value(size_t value, int64_t samples) const {
    const auto reads_it = [&](size_t s) {
      return std::ranges::count(plan_.steps[s].inputs, static_cast<int>(value)) > 0 &&
             (layers_[s]->reads().*of_values_);
    };
    if (T* shared = walk_ && !any_step(reads_it) ? walk_->value(value) : nullptr) return shared;
    return take(samples * plan_.values[value].sample_size());
  }

  T* gradient(size_t value, int64_t samples) const {
    const auto reads_it = [&](size_t s) {
      return plan_.steps[s].output == static_cast<int>(value) && of_gradients_ && (layers_[s]->reads().*of_gradients_);
    };
    if (T* shared = walk_ && !any_step(reads_it) ? walk_->gradient(value) : nullptr) return shared;
    return take(samples * plan_.values[value].dense_size());
  }

  T* state(size_t step, int64_t samples) const { return take(layers_[step]->state_size(samples)); }
  T* tangent_state(size_t step, int64_t samples) const { return take(layers_[step]->tangent_state_size(samples)); }

  // Taken so far.
  int64_t numbers() const { return numbers_; }

 private:
  template <class Reading>
  bool any_step(const Reading& reads_it) const {
    for (size_t s = 0; s < layers_.size(); ++s) {
      if (reads_it(s)) return true;
    }
    return false;
  }

  T* take(int64_t count) const {
    numbers_ += count;
    return memory_.take(count);
  }

  const Plan& plan_;
  const std::vector<std::unique_ptr<Layer<T>>>& layers_;
  Memory<T>& memory_;
  WalkMemory<T>* const walk_;
  const WhatIsRead of_values_, of_gradients_;
  mutable int64_t numbers_ = 0;
};

}  // namespace innerloop::INNERLOOP_ISA
