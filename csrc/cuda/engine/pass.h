// The memory of one pass through the GPU executor: by value, and by step.
#pragma once

#include <algorithm>
#include <memory>
#include <vector>

#include "cuda/engine/layer.h"
#include "cuda/engine/workspace.h"

namespace innerloop::gpu {

// Which part of the network: the one that moves over the inner steps, or the one above it that does not.
enum class Part : uint8_t { fixed, moving };

template <class T>
struct Pass {
  Side side = Side::support;
  int64_t samples = 0;  // of a task
  std::vector<T*> values, gradients;
  std::vector<T*> states;
};

// Takes it for a chunk of tasks.
template <class T>
class PassMaker {
 public:
  PassMaker(const Graph& graph, const Request<T>& request, const std::vector<std::unique_ptr<Layer<T>>>& layers,
            int64_t tasks, Workspace& workspace)
      : graph_(graph), request_(request), layers_(layers), tasks_(tasks), workspace_(workspace) {}

  Pass<T> fixed(Side side, int64_t samples) { return take(side, samples, Part::fixed, nullptr); }

  // What does not move is in the fixed pass of the same side.
  Pass<T> moving(const Pass<T>& fixed) { return take(fixed.side, fixed.samples, Part::moving, &fixed); }

  // Of the derivatives of a moving pass.
  Pass<T> tangent(const Pass<T>& pass) {
    Pass<T> made;
    made.side = pass.side;
    made.samples = pass.samples;
    for (size_t value = 0; value < size(); ++value) {
      const bool here = graph_.moves[value] && is_stored(static_cast<int>(value));
      made.values.push_back(here ? take_value(value, pass.samples) : nullptr);
      made.gradients.push_back(here ? take_value(value, pass.samples) : nullptr);
    }
    for (size_t s = 0; s < graph_.steps.size(); ++s) {
      const int64_t numbers = graph_.steps[s].moves ? layers_[s]->tangent_state_size(pass.samples) : 0;
      made.states.push_back(workspace_.take<T>(tasks_ * numbers));
    }
    return made;
  }

 private:
  Pass<T> take(Side side, int64_t samples, Part part, const Pass<T>* fixed) {
    const int output = request_.program->output;
    Pass<T> pass;
    pass.side = side;
    pass.samples = samples;
    for (size_t value = 0; value < size(); ++value) {
      if (fixed && !graph_.moves[value]) {
        pass.values.push_back(fixed->values[value]);
        pass.gradients.push_back(static_cast<int>(value) == output ? take_value(value, samples) : nullptr);
        continue;
      }
      const bool here = graph_.moves[value] == (part == Part::moving) && is_stored(static_cast<int>(value));
      const bool with_gradient =
          here && (part == Part::moving || (request_.wants_gradients() && graph_.has_tracked[value]));
      pass.values.push_back(here ? take_value(value, samples) : nullptr);
      pass.gradients.push_back(with_gradient ? take_value(value, samples) : nullptr);
    }
    for (size_t s = 0; s < graph_.steps.size(); ++s) {
      const bool moves = graph_.steps[s].moves;
      if (fixed && !moves) {
        pass.states.push_back(fixed->states[s]);
      } else {
        const bool here = moves == (part == Part::moving);
        pass.states.push_back(here ? workspace_.take<T>(tasks_ * layers_[s]->state_size(samples)) : nullptr);
      }
    }
    return pass;
  }

  size_t size() const { return request_.program->values.size(); }
  T* take_value(size_t value, int64_t samples) {
    return workspace_.take<T>(tasks_ * samples * request_.program->values[value].size());
  }

  // A value that a fused step keeps to itself needs no memory.
  bool is_stored(int value) const {
    return value == 0 || std::ranges::any_of(graph_.steps, [&](const Step& step) { return step.output == value; });
  }

  const Graph& graph_;
  const Request<T>& request_;
  const std::vector<std::unique_ptr<Layer<T>>>& layers_;
  const int64_t tasks_;
  Workspace& workspace_;
};

// Takes what layers use in turn, in passes of up to that many samples.
template <class T>
Scratch<T> take_scratch(const std::vector<std::unique_ptr<Layer<T>>>& layers, int64_t tasks, int64_t samples,
                        Workspace& workspace) {
  ScratchSize largest;
  for (const std::unique_ptr<Layer<T>>& layer : layers) {
    const ScratchSize size = layer->scratch_size(samples);
    largest.patches = std::max(largest.patches, size.patches);
    largest.product = std::max(largest.product, size.product);
    largest.sums = std::max(largest.sums, size.sums);
  }
  Scratch<T> scratch;
  for (T*& patches : scratch.patches) patches = workspace.take<T>(tasks * largest.patches);
  scratch.product = workspace.take<T>(tasks * largest.product);
  scratch.sums = workspace.take<double>(tasks * largest.sums);
  return scratch;
}

}  // namespace innerloop::gpu
