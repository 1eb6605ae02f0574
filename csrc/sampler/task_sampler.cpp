#include "sampler/task_sampler.h"

#include <algorithm>
#include <numeric>
#include <utility>
#include <vector>

#include "sampler/philox.h"

namespace innerloop {
namespace {

// Draws without replacement: the first steps of a Fisher-Yates shuffle over 0 … n-1. The array is kept between draws
// and the swaps are undone, so that a draw costs its own size, not n.
class Shuffle {
 public:
  explicit Shuffle(int64_t largest) : order_(static_cast<size_t>(largest)) {
    std::iota(order_.begin(), order_.end(), int64_t{0});
  }

  // count different numbers of 0 … n-1, valid until the next draw
  std::span<const int64_t> draw(TaskRandom& random, int64_t count, int64_t n) {
    for (auto swap = swaps_.rbegin(); swap != swaps_.rend(); ++swap) {
      std::swap(order_[static_cast<size_t>(swap->first)], order_[static_cast<size_t>(swap->second)]);
    }
    swaps_.clear();
    for (int64_t i = 0; i < count; ++i) {
      const int64_t other = i + random.below(n - i);
      std::swap(order_[static_cast<size_t>(i)], order_[static_cast<size_t>(other)]);
      swaps_.emplace_back(i, other);
    }
    return {order_.data(), static_cast<size_t>(count)};
  }

 private:
  std::vector<int64_t> order_;
  std::vector<std::pair<int64_t, int64_t>> swaps_;
};

}  // namespace

void sample_tasks(std::span<const int64_t> starts, std::span<const int64_t> classes, TaskShape shape, uint64_t seed,
                  uint64_t first_task, int64_t tasks, int64_t* support, int64_t* query) {
  int64_t largest_class = 0;
  for (const int64_t c : classes) {
    largest_class = std::max(largest_class, starts[static_cast<size_t>(c) + 1] - starts[static_cast<size_t>(c)]);
  }
  Shuffle class_shuffle(static_cast<int64_t>(classes.size()));
  Shuffle sample_shuffle(largest_class);
  for (int64_t task = 0; task < tasks; ++task) {
    TaskRandom random(seed, first_task + static_cast<uint64_t>(task));
    for (const int64_t position : class_shuffle.draw(random, shape.ways, static_cast<int64_t>(classes.size()))) {
      const auto c = static_cast<size_t>(classes[static_cast<size_t>(position)]);
      const auto drawn = sample_shuffle.draw(random, shape.shots + shape.queries, starts[c + 1] - starts[c]);
      for (int64_t i = 0; i < shape.shots; ++i) *support++ = starts[c] + drawn[static_cast<size_t>(i)];
      for (int64_t i = 0; i < shape.queries; ++i) *query++ = starts[c] + drawn[static_cast<size_t>(shape.shots + i)];
    }
  }
}

}  // namespace innerloop
