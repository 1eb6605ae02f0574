// Memory for what one walk through the network writes and nobody reads after it: values that no layer reads on the way
// back, and gradients that have gone on. Two of which one is read for the last time before the other is written lie in
// the same place.
#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include "engine/items.h"
#include "engine/memory.h"
#include "engine/plan.h"

namespace innerloop::INNERLOOP_ISA {

template <class T>
class WalkMemory {
 public:
  // samples: the most that a walk is of.
  WalkMemory(const Plan& plan, int output, int64_t samples, Memory<T>& memory)
      : samples_(samples), memory_(memory), values_(plan.values.size(), -1), gradients_(values_) {
    const int steps = static_cast<int>(plan.steps.size());
    std::vector<Life> values, gradients;
    for (int s = 0; s < steps; ++s) {
      const int value = at(plan.steps, s).output;
      const ValueLayout& layout = at(plan.values, value);
      // What is 0 in a halo and in padding must stay so; the loss stands outside the walk.
      const bool is_dense = layout.halo == 0 && layout.stride == layout.shape.channels;
      if (!is_dense || value == output || !at(plan.moves, value)) continue;
      int last = s;
      for (int reader = s + 1; reader < steps; ++reader) {
        if (std::ranges::count(at(plan.steps, reader).inputs, value) > 0) last = reader;
      }
      values.push_back({value, s, last, layout.dense_size()});
      gradients.push_back({value, -last, -s, layout.dense_size()});  // it is walked back
    }
    std::ranges::stable_sort(gradients, {}, &Life::begin);
    settle(values, values_);
    for (Place& place : places_) place.taken_until = nobody;
    settle(gradients, gradients_);
  }

  // Whether a value and its gradient can lie here; and where.
  bool holds(size_t value) const { return values_[value] >= 0; }
  T* value(size_t value) { return memory_of(values_[value]); }
  T* gradient(size_t value) { return memory_of(gradients_[value]); }

 private:
  static constexpr int nobody = INT32_MIN;

  // From the step that writes an array to the last that reads it, in the order of the walk.
  struct Life {
    int value, begin, end;
    int64_t size;  // of a sample
  };
  struct Place {
    int taken_until = nobody;
    int64_t size = 0;
    T* memory = nullptr;
  };

  // Each in the free place that need grow least, and of those the smallest; else in a new one.
  void settle(const std::vector<Life>& lives, std::vector<int>& place_of) {
    for (const Life& life : lives) {
      const auto cost = [&](const Place& place) {
        return std::pair{std::max<int64_t>(life.size - place.size, 0), place.size};
      };
      int best = -1;
      for (int i = 0; i < static_cast<int>(places_.size()); ++i) {
        if (at(places_, i).taken_until >= life.begin) continue;
        if (best < 0 || cost(at(places_, i)) < cost(at(places_, best))) best = i;
      }
      if (best < 0) {
        best = static_cast<int>(places_.size());
        places_.emplace_back();
      }
      at(places_, best).taken_until = life.end;
      at(places_, best).size = std::max(at(places_, best).size, life.size);
      at(place_of, life.value) = best;
    }
  }

  T* memory_of(int index) {
    Place& place = at(places_, index);
    if (place.memory == nullptr) place.memory = memory_.take(samples_ * place.size);
    return place.memory;
  }

  const int64_t samples_;
  Memory<T>& memory_;
  std::vector<int> values_, gradients_;  // places by value
  std::vector<Place> places_;
};

}  // namespace innerloop::INNERLOOP_ISA
