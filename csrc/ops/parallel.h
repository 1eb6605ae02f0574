// How the CPU ops share their work among torch's threads.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>

namespace innerloop {

// Of sizes. Floating: where one of them is 0, that of the others may be beyond 64 bits.
template <class... Sizes>
double product(Sizes... sizes) {
  return (static_cast<double>(sizes) * ...);
}

// Iterations that make a thread worth its start: about 30,000 operations.
inline int64_t grain(double operations_each) {
  return 1 + static_cast<int64_t>(30000 / (operations_each + 1));
}

// Calls work(task, first, last) for blocks of 0 … count-1 in every task, in parallel: one large task is shared by the
// threads too, and the blocks do not depend on how many there are.
template <class Work>
void for_blocks(int64_t tasks, int64_t count, int64_t block, double operations_each, const Work& work) {
  const int64_t blocks = (count + block - 1) / block;
  torch::stable::parallel_for(0, tasks * blocks, grain(product(block, operations_each)),
                              [&](int64_t begin, int64_t end) {
                                for (int64_t i = begin; i < end; ++i) {
                                  const int64_t first = i % blocks * block;
                                  work(i / blocks, first, std::min(first + block, count));
                                }
                              });
}

constexpr int64_t rows_a_block = 160;     // of distances
constexpr int64_t columns_a_block = 800;  // of their gradient; whole vectors

}  // namespace innerloop
