// The memory of passes through the GPU executor.
#pragma once

#include <algorithm>
#include <memory>
#include <vector>

#include "cuda/engine/layer.h"
#include "cuda/engine/workspace.h"

namespace innerloop::gpu {

// Takes it for a chunk of tasks.
template <class T>
class PassMemory {
 public:
  PassMemory(const Program& program, const std::vector<std::unique_ptr<Layer<T>>>& layers, int64_t tasks,
             Workspace& workspace)
      : program_(program), layers_(layers), tasks_(tasks), workspace_(workspace) {}

  T* value(size_t value, int64_t samples) const {
    return workspace_.take<T>(tasks_ * samples * program_.values[value].size());
  }
  T* gradient(size_t value, int64_t samples) const { return this->value(value, samples); }
  T* state(size_t step, int64_t samples) const {
    return workspace_.take<T>(tasks_ * layers_[step]->state_size(samples));
  }
  T* tangent_state(size_t step, int64_t samples) const {
    return workspace_.take<T>(tasks_ * layers_[step]->tangent_state_size(samples));
  }

 private:
  const Program& program_;
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
