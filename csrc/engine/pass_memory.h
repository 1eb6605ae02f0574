// The memory of passes through the blocks executor.
#pragma once

#include <algorithm>
#include <cmath>
#include <memory>
#include <optional>
#include <string>
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
    if (walk_ && walk_->holds(value) && !any_step(reads_it)) return walk_->value(value);
    return take(samples * plan_.values[value].sample_size());
  }

  T* gradient(size_t value, int64_t samples) const {
    const auto reads_it = [&](size_t s) {
      return plan_.steps[s].output == static_cast<int>(value) && of_gradients_ && (layers_[s]->reads().*of_gradients_);
    };
    if (walk_ && walk_->holds(value) && !any_step(reads_it)) return walk_->gradient(value);
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

// What all support passes would take beside each other, in bytes. Floating, for any number of steps.
template <class T>
double size_of_support_passes(const Plan& plan, const Request<T>& request,
                              const std::vector<std::unique_ptr<Layer<T>>>& layers) {
  Memory<T> nothing;
  WalkMemory<T> walk(plan, request.program->output, request.support.count, nothing);
  const PassMemory<T> of_fixed(plan, layers, nothing), of_support(plan, layers, nothing, &walk, &Reads::x, &Reads::dy);
  const auto make = [&](const PassMemory<T>& memory) {
    return PassMaker<T, PassMemory<T>>(plan, request, std::nullopt, memory);
  };
  make(of_support).moving(make(of_fixed).fixed(Side::support, request.support.count));
  return static_cast<double>(request.steps) * static_cast<double>(of_support.numbers()) * sizeof(T);
}

// Whether they are kept, so that the way back of second order need not go through them again.
template <class T>
bool keeps_support_passes(const Plan& plan, const Request<T>& request,
                          const std::vector<std::unique_ptr<Layer<T>>>& layers) {
  constexpr double most_kept = 1 << 28;  // bytes
  if (request.steps < 2) return true;    // one is there anyway
  if (request.paths.kept_passes != Use::automatic) return request.paths.kept_passes == Use::forced;
  return size_of_support_passes(plan, request, layers) <= most_kept;
}

// A line where they are not.
template <class T>
std::string describe_support_passes(const Plan& plan, const Request<T>& request) {
  if (!request.wants_gradients() || request.first_order) return "";
  Arena arena;
  Memory<T> memory(arena);
  ConvolutionScratch<T> scratch(memory);
  const std::vector<std::unique_ptr<Layer<T>>> layers = make_layers(plan, request, memory, scratch);
  if (keeps_support_passes(plan, request, layers)) return "";
  const int64_t megabytes = std::llround(size_of_support_passes(plan, request, layers) / 1e6);
  return "support passes: repeated on the way back, where they would take " + std::to_string(megabytes) + " MB\n";
}

}  // namespace innerloop::INNERLOOP_ISA
