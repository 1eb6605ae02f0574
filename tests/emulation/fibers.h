// The threads of a block as fibers of one thread, which switch at barriers alone. Quick: a thread that meets no barrier
// costs a function call, and its stack serves the next one.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <vector>

inline dim3 threadIdx;

namespace emulation {

class Fibers {
 public:
  void run(unsigned threads, const std::function<void()>& kernel) {
    kernel_ = &kernel;
    threads_ = threads;
    next_ = 0;
    used_ = 0;
    waiting_in_warp_.assign((threads + lanes - 1) / lanes, 0);
    waiting_in_block_ = 0;
    // A fiber runs one thread after another until one waits; those behind it are for the next fiber.
    while (next_ < threads_) start(fiber(used_++));
    while (waiting_in_block_ > 0 || waiting_in_warps() > 0) {
      if (!release()) return;  // the fibers' stacks are abandoned as they are
      for (size_t i = 0; i < used_; ++i) {
        if (fibers_[i]->state == State::ready) resume(*fibers_[i]);
      }
    }
  }

  void wait_for_block() {
    ++waiting_in_block_;
    wait(State::at_block_barrier);
  }

  void wait_for_warp() {
    ++waiting_in_warp_[current_->thread / lanes];
    wait(State::at_warp_barrier);
  }

 private:
  enum class State : uint8_t { ready, at_block_barrier, at_warp_barrier, done };

  struct Fiber {
    static constexpr size_t stack_bytes = 128 << 10;
    std::unique_ptr<char[]> stack{new char[stack_bytes]};
    ucontext_t beginning;
    jmp_buf place;
    unsigned thread;
    State state;
  };

  Fiber& fiber(size_t index) {
    if (index == fibers_.size()) fibers_.push_back(std::make_unique<Fiber>());
    return *fibers_[index];
  }

  [[gnu::noinline]] void start(Fiber& fiber) {
    current_ = &fiber;
    getcontext(&fiber.beginning);
    fiber.beginning.uc_stack.ss_sp = fiber.stack.get();
    fiber.beginning.uc_stack.ss_size = Fiber::stack_bytes;
    fiber.beginning.uc_link = nullptr;
    makecontext(&fiber.beginning, &Fibers::begin, 0);
    if (_setjmp(scheduler_) == 0) setcontext(&fiber.beginning);
  }

  static void begin();

  void run_threads() {
    while (next_ < threads_) {
      current_->thread = next_++;
      current_->state = State::ready;
      threadIdx = index_of_thread(current_->thread);
      (*kernel_)();
    }
    current_->state = State::done;
    _longjmp(scheduler_, 1);
  }

  // _setjmp and _longjmp switch without the system call that swapcontext makes.
  [[gnu::noinline]] void resume(Fiber& fiber) {
    current_ = &fiber;
    threadIdx = index_of_thread(fiber.thread);
    if (_setjmp(scheduler_) == 0) _longjmp(fiber.place, 1);
  }

  [[gnu::noinline]] void wait(State state) {
    current_->state = state;
    if (_setjmp(current_->place) == 0) _longjmp(scheduler_, 1);
  }

  unsigned waiting_in_warps() const {
    unsigned sum = 0;
    for (unsigned count : waiting_in_warp_) sum += count;
    return sum;
  }

  // Opens the barriers that all have reached: true if there was one.
  bool release() {
    bool any = false;
    if (waiting_in_block_ == threads_) {
      any = true;
      waiting_in_block_ = 0;
      for (size_t i = 0; i < used_; ++i) fibers_[i]->state = State::ready;
    }
    for (unsigned warp = 0; warp < waiting_in_warp_.size(); ++warp) {
      if (waiting_in_warp_[warp] == 0 || waiting_in_warp_[warp] != std::min(lanes, threads_ - warp * lanes)) continue;
      any = true;
      waiting_in_warp_[warp] = 0;
      for (size_t i = 0; i < used_; ++i) {
        if (fibers_[i]->state == State::at_warp_barrier && fibers_[i]->thread / lanes == warp) {
          fibers_[i]->state = State::ready;
        }
      }
    }
    if (!any) fault = "emulation: some threads wait at a barrier that others of their block never reach";
    return any;
  }

  const std::function<void()>* kernel_ = nullptr;
  std::vector<std::unique_ptr<Fiber>> fibers_;
  size_t used_ = 0;
  unsigned threads_ = 0, next_ = 0;
  Fiber* current_ = nullptr;
  jmp_buf scheduler_;
  unsigned waiting_in_block_ = 0;
  std::vector<unsigned> waiting_in_warp_;
};

inline Fibers fibers;

inline void Fibers::begin() {
  fibers.run_threads();
}

inline void run_block(unsigned threads, const std::function<void()>& kernel) {
  fibers.run(threads, kernel);
}

inline void wait_for_block() {
  fibers.wait_for_block();
}

inline void wait_for_warp() {
  fibers.wait_for_warp();
}

}  // namespace emulation
