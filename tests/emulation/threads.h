// The threads of a block as threads of the system: slow, but ThreadSanitizer sees what a missing barrier leaves open.
#pragma once

#include <barrier>
#include <thread>
#include <vector>

inline thread_local dim3 threadIdx;

namespace emulation {

inline unsigned own_thread();

inline std::barrier<>* block_barrier;
inline std::vector<std::unique_ptr<std::barrier<>>> warp_barriers;

inline void wait_for_block() {
  block_barrier->arrive_and_wait();
}

inline void wait_for_warp() {
  warp_barriers[own_thread() / lanes]->arrive_and_wait();
}

inline void run_block(unsigned threads, const std::function<void()>& kernel) {
  std::barrier<> barrier(threads);
  block_barrier = &barrier;
  warp_barriers.clear();
  for (unsigned first = 0; first < threads; first += lanes) {
    warp_barriers.push_back(std::make_unique<std::barrier<>>(std::min(lanes, threads - first)));
  }
  std::vector<std::thread> pool;
  pool.reserve(threads);
  for (unsigned thread = 0; thread < threads; ++thread) {
    pool.emplace_back([&, thread] {
      threadIdx = index_of_thread(thread);
      kernel();
      warp_barriers[thread / lanes]->arrive_and_drop();
      barrier.arrive_and_drop();
    });
  }
  for (std::thread& each : pool) each.join();
}

}  // namespace emulation
