// One pass through a network: what belongs to it, by value and by step.
#pragma once

#include <algorithm>
#include <cstdint>
#include <optional>
#include <vector>

#include "engine/graph.h"

namespace innerloop::INNERLOOP_ISA {

// Which part of the network: the one that moves over the inner steps, or the one above it that does not.
enum class Part : uint8_t { fixed, moving };

template <class T>
struct Pass {
  Side side = Side::support;
  int64_t samples = 0;                // of a task
  std::vector<T*> values, gradients;  // by value
  std::vector<T*> states;             // by step
};

inline bool belongs(const Step& step, Part part) {
  return step.moves == (part == Part::moving);
}

// Makes passes, each with what it needs: value(value, samples), gradient(value, samples), state(step, samples) and
// tangent_state(step, samples) of a Memory, which is the executor's own.
template <class T, class Memory>
class PassMaker {
 public:
  // input: the value that samples are loaded into, if they are.
  PassMaker(const Graph& graph, const Request<T>& request, std::optional<int> input, const Memory& memory)
      : graph_(graph),
        output_(request.program->output),
        input_(input),
        backward_(request.wants_gradients()),
        memory_(memory) {}

  Pass<T> fixed(Side side, int64_t samples) const { return made(side, samples, Part::fixed, nullptr); }

  // What does not move is in the fixed pass of the same side.
  Pass<T> moving(const Pass<T>& fixed) const { return made(fixed.side, fixed.samples, Part::moving, &fixed); }

  // Of the derivatives of a moving pass.
  Pass<T> tangent(const Pass<T>& pass) const {
    Pass<T> tangent;
    tangent.side = pass.side;
    tangent.samples = pass.samples;
    for (size_t value = 0; value < graph_.moves.size(); ++value) {
      const bool here = graph_.moves[value] && is_stored(value);
      tangent.values.push_back(here ? memory_.value(value, pass.samples) : nullptr);
      tangent.gradients.push_back(here ? memory_.gradient(value, pass.samples) : nullptr);
    }
    for (size_t step = 0; step < graph_.steps.size(); ++step) {
      tangent.states.push_back(graph_.steps[step].moves ? memory_.tangent_state(step, pass.samples) : nullptr);
    }
    return tangent;
  }

 private:
  Pass<T> made(Side side, int64_t samples, Part part, const Pass<T>* fixed) const {
    Pass<T> pass;
    pass.side = side;
    pass.samples = samples;
    for (size_t value = 0; value < graph_.moves.size(); ++value) {
      if (fixed && !graph_.moves[value]) {
        pass.values.push_back(fixed->values[value]);
        pass.gradients.push_back(static_cast<int>(value) == output_ ? memory_.gradient(value, samples) : nullptr);
        continue;
      }
      const bool here = graph_.moves[value] == (part == Part::moving) && is_stored(value);
      const bool with_gradient = here && (part == Part::moving || (backward_ && graph_.has_tracked[value]));
      pass.values.push_back(here ? memory_.value(value, samples) : nullptr);
      pass.gradients.push_back(with_gradient ? memory_.gradient(value, samples) : nullptr);
    }
    for (size_t step = 0; step < graph_.steps.size(); ++step) {
      const bool moves = graph_.steps[step].moves;
      if (fixed && !moves) {
        pass.states.push_back(fixed->states[step]);
      } else {
        const bool here = moves == (part == Part::moving);
        pass.states.push_back(here ? memory_.state(step, samples) : nullptr);
      }
    }
    return pass;
  }

  // A value that a fused step keeps to itself needs no memory.
  bool is_stored(size_t value) const {
    const int index = static_cast<int>(value);
    return index == input_ || std::ranges::any_of(graph_.steps, [&](const Step& step) { return step.output == index; });
  }

  const Graph& graph_;
  const int output_;
  const std::optional<int> input_;
  const bool backward_;
  const Memory& memory_;
};

}  // namespace innerloop::INNERLOOP_ISA
