// The samples of one task on one side, as the blocks executor reads them: the valid ones one after another, brought
// together, or where they lie in torch's memory if they lie so there.
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
        in_place_(!samples.mask && input.pixels() == 1 && input.stride == input.shape.channels &&
                  input.stride % lanes<T> == 0),
        labels_(samples.labels ? static_cast<size_t>(samples.count) : 0),
        values_(samples.targets ? static_cast<size_t>(samples.count * outputs) : 0) {}

  // Whether they are read where they lie: load() then needs no memory.
  bool in_place() const { return in_place_; }

  // Brings the task's valid samples into memory of the input's layout, and its targets here.
  void load(int64_t task, T* memory) {
    valid_ = 0;
    if (samples_.x == nullptr) return;
    input_data_ = in_place_ ? samples_.x + task * samples_.count * input_.stride : memory;
    for_valid(task, [&](int64_t index) {
      if (!in_place_) load_sample(samples_.x + index * input_.shape.size(), valid_, memory);
      if (samples_.labels) labels_[static_cast<size_t>(valid_)] = samples_.labels[index];
      if (samples_.targets)
        std::copy_n(samples_.targets + index * outputs_, outputs_, &values_[static_cast<size_t>(valid_ * outputs_)]);
      ++valid_;
    });
  }

  // --- of the task loaded last --------------------------------------------------------------------

  int64_t valid() const { return valid_; }
  const T* input() const { return input_data_; }
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
  const bool in_place_;
  int64_t valid_ = 0;
  const T* input_data_ = nullptr;
  std::vector<int64_t> labels_;
  std::vector<T> values_;
};

}  // namespace innerloop::INNERLOOP_ISA
