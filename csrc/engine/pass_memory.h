// The memory of one pass through the blocks executor: by value, and by step.
#pragma once

#include <algorithm>
#include <vector>

#include "engine/blocks_engine.h"
#include "engine/memory.h"

namespace innerloop::INNERLOOP_ISA {

// Which part of the network: the one that moves over the inner steps, or the one above it that does not.
enum class Part : uint8_t { fixed, moving };

template <class T>
struct PassMemory {
  Side side = Side::support;
  int64_t samples = 0;  // of the task at hand
  std::vector<T*> values, gradients;
  std::vector<T*> states;
};

// Takes it, for the passes of one worker.
template <class T>
class PassAllocator {
 public:
  PassAllocator(const BlocksEngine<T>& engine, const std::vector<std::unique_ptr<Layer<T>>>& layers, Memory<T>& memory)
      : plan_(engine.plan),
        output_(engine.request.program->output),
        backward_(engine.request.wants_gradients()),
        layers_(layers),
        memory_(memory) {}

  PassMemory<T> fixed(Side side, int64_t samples) { return take(side, samples, Part::fixed, nullptr); }

  // What does not move is in the fixed pass of the same side.
  PassMemory<T> moving(Side side, int64_t samples, const PassMemory<T>& fixed) {
    return take(side, samples, Part::moving, &fixed);
  }

  // Of the derivatives of a moving pass.
  PassMemory<T> tangent(int64_t samples) {
    PassMemory<T> pass;
    for (size_t value = 0; value < plan_.values.size(); ++value) {
      const bool here = plan_.moves[value] && is_stored(static_cast<int>(value));
      pass.values.push_back(here ? memory_.take(samples * plan_.values[value].sample_size()) : nullptr);
      pass.gradients.push_back(here ? memory_.take(samples * plan_.values[value].dense_size()) : nullptr);
    }
    for (size_t s = 0; s < plan_.steps.size(); ++s) {
      pass.states.push_back(plan_.steps[s].moves ? memory_.take(layers_[s]->tangent_state_size(samples)) : nullptr);
    }
    return pass;
  }

 private:
  PassMemory<T> take(Side side, int64_t samples, Part part, const PassMemory<T>* fixed) {
    PassMemory<T> pass;
    pass.side = side;
    for (size_t value = 0; value < plan_.values.size(); ++value) {
      const ValueLayout& layout = plan_.values[value];
      if (fixed && !plan_.moves[value]) {
        pass.values.push_back(fixed->values[value]);
        pass.gradients.push_back(static_cast<int>(value) == output_ ? memory_.take(samples * layout.dense_size())
                                                                    : nullptr);
        continue;
      }
      const bool here = plan_.moves[value] == (part == Part::moving) && is_stored(static_cast<int>(value));
      const bool with_gradient = here && (part == Part::moving || (backward_ && plan_.has_tracked[value]));
      pass.values.push_back(here ? memory_.take(samples * layout.sample_size()) : nullptr);
      pass.gradients.push_back(with_gradient ? memory_.take(samples * layout.dense_size()) : nullptr);
    }
    for (size_t s = 0; s < plan_.steps.size(); ++s) {
      const bool moves = plan_.steps[s].moves;
      if (fixed && !moves) {
        pass.states.push_back(fixed->states[s]);
      } else {
        const bool here = moves == (part == Part::moving);
        pass.states.push_back(here ? memory_.take(layers_[s]->state_size(samples)) : nullptr);
      }
    }
    return pass;
  }

  // A value that a fused step keeps to itself needs no memory.
  bool is_stored(int value) const {
    return value == plan_.input ||
           std::ranges::any_of(plan_.steps, [&](const Step& step) { return step.output == value; });
  }

  const Plan& plan_;
  const int output_;
  const bool backward_;
  const std::vector<std::unique_ptr<Layer<T>>>& layers_;
  Memory<T>& memory_;
};

}  // namespace innerloop::INNERLOOP_ISA
