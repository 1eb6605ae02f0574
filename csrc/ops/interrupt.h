// Ctrl-C in the middle of a long call: between tasks the interpreter's signal handlers are run, as they are between the
// steps of a Python program, and where one raises, the call ends.
//
// Python's functions are looked up in the process that loaded this library: it is not linked to an interpreter, and
// where there is none nothing is watched.
#pragma once

#include <chrono>
#include <stdexcept>

namespace innerloop {

// What ends a call whose signal handler raised. The handler's own exception is kept for innerloop_raise_interrupt().
struct Interrupted : std::runtime_error {
  Interrupted() : std::runtime_error("interrupted by a signal") {}
};

// Watches while it lives, on the interpreter's main thread; elsewhere check() does nothing, as Python does.
class SignalWatch {
 public:
  SignalWatch();

  // To be called often: it looks a few times a second. Throws Interrupted.
  void check();

 private:
  using Clock = std::chrono::steady_clock;
  bool watching_;
  Clock::time_point next_;
};

}  // namespace innerloop
