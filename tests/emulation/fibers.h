// The threads of a block as fibers of one thread of the system, which switch at barriers alone. Quick: a thread that
// meets no barrier costs a function call, and its stack serves the next one.
//
// Sanitizers are told of every switch. To ThreadSanitizer each CUDA thread is a thread of its own, and only barriers
// put what two of them do in an order: it reports what a missing barrier leaves open, whatever runs first here.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <vector>

#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
#elif defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

// Of functions whose reads and writes are the emulation's, not a kernel's.
#define EMULATION_UNWATCHED [[gnu::noinline, gnu::no_sanitize("thread")]]

inline dim3 threadIdx;

namespace emulation {

// What a sanitizer has to know of a stack.
#if defined(__SANITIZE_THREAD__)
struct WatchedStack {
  void* fiber = nullptr;

  EMULATION_UNWATCHED void is_current() { fiber = __tsan_get_current_fiber(); }
  EMULATION_UNWATCHED void is_new(void*, size_t) { fiber = __tsan_create_fiber(0); }
  EMULATION_UNWATCHED void leave_for(WatchedStack& next) {
    __tsan_switch_to_fiber(next.fiber, __tsan_switch_to_fiber_no_sync);
  }
  void arrive() {}
};
// All that was done before a release of a place comes before what is done after an acquire of it.
inline void release(void* place) {
  __tsan_release(place);
}
inline void acquire(void* place) {
  __tsan_acquire(place);
}
constexpr bool a_fiber_for_each_thread = true;
#elif defined(__SANITIZE_ADDRESS__)
struct WatchedStack {
  const void* bottom = nullptr;
  size_t bytes = 0;
  void* fake = nullptr;

  void is_current() {
    pthread_attr_t attributes;
    void* begin = nullptr;
    pthread_getattr_np(pthread_self(), &attributes);
    pthread_attr_getstack(&attributes, &begin, &bytes);
    pthread_attr_destroy(&attributes);
    bottom = begin;
  }
  void is_new(void* begin, size_t size) { bottom = begin, bytes = size; }
  void leave_for(WatchedStack& next) { __sanitizer_start_switch_fiber(&fake, next.bottom, next.bytes); }
  void arrive() { __sanitizer_finish_switch_fiber(fake, nullptr, nullptr); }
};
#else
struct WatchedStack {
  void is_current() {}
  void is_new(void*, size_t) {}
  void leave_for(WatchedStack&) {}
  void arrive() {}
};
#endif
#if !defined(__SANITIZE_THREAD__)
inline void release(void*) {}
inline void acquire(void*) {}
constexpr bool a_fiber_for_each_thread = false;
#endif

class Fibers {
 public:
  EMULATION_UNWATCHED void run(unsigned threads, const std::function<void()>& kernel) {
    kernel_ = &kernel;
    threads_ = threads;
    next_ = 0;
    used_ = 0;
    of_warp_.assign((threads + lanes - 1) / lanes, {});
    of_block_ = {};
    scheduler_stack_.is_current();
    release(&start_);
    // A fiber runs one thread after another until one waits; those behind it are for the next fiber.
    while (next_ < threads_) resume(fiber(used_++));
    while (of_block_.waiting > 0 || waiting_in_warps() > 0) {
      if (!open_barriers()) return abandon();
      for (size_t i = 0; i < used_; ++i) {
        if (fibers_[i]->state == State::ready) resume(*fibers_[i]);
      }
    }
    acquire(&end_);
  }

  EMULATION_UNWATCHED void wait_for_block() { wait(State::at_block_barrier, of_block_); }

  EMULATION_UNWATCHED void wait_for_warp() { wait(State::at_warp_barrier, of_warp_[current_->thread / lanes]); }

 private:
  enum class State : uint8_t { ready, at_block_barrier, at_warp_barrier, done };

  struct Barrier {
    unsigned waiting = 0, opened = 0;
    char places[2] = {};  // by turns: a thread may reach it again before another one has left it
  };

  struct Fiber {
    static constexpr size_t stack_bytes = 256 << 10;
    std::unique_ptr<char[]> stack{new char[stack_bytes]};
    ucontext_t beginning;
    jmp_buf place;
    bool has_begun = false;
    unsigned thread = 0;
    State state = State::done;
    WatchedStack watched;

    Fiber() { watched.is_new(stack.get(), stack_bytes); }
  };

  Fiber& fiber(size_t index) {
    if (index == fibers_.size()) fibers_.push_back(std::make_unique<Fiber>());
    return *fibers_[index];
  }

  void abandon() {
    for (std::unique_ptr<Fiber>& fiber : fibers_) fiber.release();  // with what their threads left on the stacks
    fibers_.clear();
  }

  // _setjmp and _longjmp switch without the system call that swapcontext makes.
  EMULATION_UNWATCHED void resume(Fiber& fiber) {
    current_ = &fiber;
    threadIdx = index_of_thread(fiber.thread);
    if (_setjmp(scheduler_) == 0) {
      scheduler_stack_.leave_for(fiber.watched);
      if (fiber.has_begun) _longjmp(fiber.place, 1);
      begin(fiber);
    }
    scheduler_stack_.arrive();
  }

  EMULATION_UNWATCHED void go_back() {
    if (_setjmp(current_->place) == 0) {
      current_->watched.leave_for(scheduler_stack_);
      _longjmp(scheduler_, 1);
    }
    current_->watched.arrive();
  }

  EMULATION_UNWATCHED void begin(Fiber& fiber) {
    fiber.has_begun = true;
    getcontext(&fiber.beginning);
    fiber.beginning.uc_stack.ss_sp = fiber.stack.get();
    fiber.beginning.uc_stack.ss_size = Fiber::stack_bytes;
    fiber.beginning.uc_link = nullptr;
    makecontext(&fiber.beginning, &Fibers::main, 0);
    setcontext(&fiber.beginning);
  }

  static void main();

  // What a fiber does: threads of one block, then, when it is resumed, of the next.
  EMULATION_UNWATCHED void run_threads() {
    current_->watched.arrive();
    while (true) {
      do {
        current_->thread = next_++;
        current_->state = State::ready;
        acquire(&start_);
        threadIdx = index_of_thread(current_->thread);
        (*kernel_)();
        release(&end_);
      } while (!a_fiber_for_each_thread && next_ < threads_);
      current_->state = State::done;
      go_back();
    }
  }

  EMULATION_UNWATCHED void wait(State state, Barrier& barrier) {
    char* place = &barrier.places[barrier.opened % 2];
    ++barrier.waiting;
    current_->state = state;
    release(place);
    go_back();
    acquire(place);
  }

  EMULATION_UNWATCHED unsigned waiting_in_warps() const {
    unsigned sum = 0;
    for (const Barrier& barrier : of_warp_) sum += barrier.waiting;
    return sum;
  }

  // Opens the barriers that all have reached: true if there was one.
  EMULATION_UNWATCHED bool open_barriers() {
    bool any = open(of_block_, threads_, State::at_block_barrier, 0, threads_);
    for (unsigned warp = 0; warp < of_warp_.size(); ++warp) {
      const unsigned first = warp * lanes, members = std::min(lanes, threads_ - first);
      any = open(of_warp_[warp], members, State::at_warp_barrier, first, first + members) || any;
    }
    if (!any) fault = "emulation: some threads wait at a barrier that others of their block never reach";
    return any;
  }

  EMULATION_UNWATCHED bool open(Barrier& barrier, unsigned members, State state, unsigned first, unsigned end) {
    if (barrier.waiting < members) return false;
    barrier.waiting = 0;
    ++barrier.opened;
    for (size_t i = 0; i < used_; ++i) {
      Fiber& fiber = *fibers_[i];
      if (fiber.state == state && fiber.thread >= first && fiber.thread < end) fiber.state = State::ready;
    }
    return true;
  }

  const std::function<void()>* kernel_ = nullptr;
  std::vector<std::unique_ptr<Fiber>> fibers_;
  size_t used_ = 0;
  unsigned threads_ = 0, next_ = 0;
  Fiber* current_ = nullptr;
  jmp_buf scheduler_;
  WatchedStack scheduler_stack_;
  char start_ = 0, end_ = 0;  // of a block: places in its order
  Barrier of_block_;
  std::vector<Barrier> of_warp_;
};

inline Fibers fibers;

inline void Fibers::main() {
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
