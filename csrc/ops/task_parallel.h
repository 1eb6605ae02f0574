// Runs an engine's chunks on torch's threads, with results that do not depend on how many there are.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <exception>
#include <memory>
#include <mutex>
#include <thread>

#include "engine/request.h"
#include "ops/interrupt.h"

namespace innerloop {

// Hands out chunks in ascending order, and lets each add its share of what tasks sum up at its turn, in that order too.
class ChunkQueue {
 public:
  explicit ChunkQueue(int64_t chunks) : chunks_(chunks) {}

  // The next chunk, or -1 when there is none left or one has failed.
  int64_t take() {
    const std::lock_guard lock(mutex_);
    return next_ < chunks_ && !failure_ ? next_++ : -1;
  }

  // Turns come within microseconds of each other where chunks are small, and to sleep and be woken takes longer: so a
  // thread tries again for some time first.
  template <class Add>
  void add_at_turn(int64_t chunk, const Add& add) {
    constexpr int tries = 200;  // less than a tenth of a millisecond
    for (int i = 0; i < tries && done_.load(std::memory_order_relaxed) != chunk; ++i) std::this_thread::yield();
    std::unique_lock lock(mutex_);
    turn_.wait(lock, [&] { return done_ == chunk || failure_; });
    if (failure_) return;
    add();
    ++done_;
    turn_.notify_all();
  }

  void fail(std::exception_ptr failure) {
    const std::lock_guard lock(mutex_);
    if (!failure_) failure_ = failure;
    turn_.notify_all();
  }

  void rethrow_failure() const {
    if (failure_) std::rethrow_exception(failure_);
  }

 private:
  const int64_t chunks_;
  int64_t next_ = 0;
  std::atomic<int64_t> done_ = 0;
  std::exception_ptr failure_;
  std::mutex mutex_;
  std::condition_variable turn_;
};

template <class T>
void run_in_parallel(Engine<T>& engine) {
  ChunkQueue queue(engine.chunks());
  SignalWatch signals;
  const auto caller = std::this_thread::get_id();
  const auto work = [&] {
    try {
      std::unique_ptr<Worker> worker;
      for (int64_t chunk = queue.take(); chunk >= 0; chunk = queue.take()) {
        if (!worker) worker = engine.make_worker();
        worker->run(chunk);
        queue.add_at_turn(chunk, [&] { worker->add_shared(); });
        if (std::this_thread::get_id() == caller) signals.check();  // the other threads end after their chunk, too
      }
    } catch (...) {
      queue.fail(std::current_exception());
    }
  };
  const int64_t threads = std::min<int64_t>(engine.chunks(), torch::stable::get_num_threads());
  if (threads <= 1) {
    work();
  } else {
    torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) work();
    });
  }
  queue.rethrow_failure();
  engine.finish();
}

}  // namespace innerloop
