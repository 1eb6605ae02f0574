// The samples of one task on one side, as the blocks executor holds them: the valid ones, brought together.
#pragma once

#include <algorithm>
#include <vector>

#include "engine/layout.h"
#include "engine/loss.h"

namespace innerloop::INNERLOOP_ISA {

template <class T>
class TaskSamples {
 public:
  // samples: of all tasks. input: the layout of the network's input. outputs: of a target.
  TaskSamples(const Samples<T>& samples, const ValueLayout& input, int64_t outputs)
      : samples_(samples),
        input_(input),
        outputs_(outputs),
        labels_(samples.labels ? static_cast<size_t>(samples.count) : 0),
        values_(samples.targets ? static_cast<size_t>(samples.count * outputs) : 0) {}

  // Brings the task's valid samples into the network's input, and its targets here; returns their number.
  int64_t load(int64_t task, T* input) {
    if (samples_.x == nullptr) return 0;
    int64_t valid = 0;
    for_valid(task, [&](int64_t index) {
      load_sample(samples_.x + index * input_.shape.size(), valid, input);
      if (samples_.labels) labels_[static_cast<size_t>(valid)] = samples_.labels[index];
      if (samples_.targets)
        std::copy_n(samples_.targets + index * outputs_, outputs_, &values_[static_cast<size_t>(valid * outputs_)]);
      ++valid;
    });
    return valid;
  }

  // Of the task loaded last.
  Targets<T> targets() const { return {labels_.data(), values_.data()}; }

  // Outputs [valid samples][stride] to their places in [T, samples, outputs].
  void write_outputs(int64_t task, const T* from, int64_t stride, T* to) const {
    for_valid(task, [&](int64_t index) {
      std::copy_n(from, outputs_, to + index * outputs_);
      from += stride;
    });
  }

 private:
  // Calls visit(index of the sample among those of all tasks) for the task's valid samples.
  template <class Visit>
  void for_valid(int64_t task, const Visit& visit) const {
    for (int64_t index = task * samples_.count; index < (task + 1) * samples_.count; ++index) {
      if (!samples_.mask || samples_.mask[index]) visit(index);
    }
  }

  // From torch's [C, H, W] to channels-last.
  void load_sample(const T* from, int64_t n, T* to) const {
    const Shape& shape = input_.shape;
    if (input_.pixels() == 1) {
      std::copy_n(from, shape.channels, to + input_.row(n, 0));
      return;
    }
    for (int64_t h = 0; h < shape.height; ++h) {
      T* row = to + input_.row(n, h);
      for (int64_t c = 0; c < shape.channels; ++c) {
        const T* line = from + (c * shape.height + h) * shape.width;
        for (int64_t w = 0; w < shape.width; ++w) row[w * input_.stride + c] = line[w];
      }
    }
  }

  const Samples<T> samples_;
  const ValueLayout input_;
  const int64_t outputs_;
  std::vector<int64_t> labels_;
  std::vector<T> values_;
};

}  // namespace innerloop::INNERLOOP_ISA
