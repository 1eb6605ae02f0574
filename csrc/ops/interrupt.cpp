#include "ops/interrupt.h"

#include <dlfcn.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace innerloop {
namespace {

// The parts of Python's stable ABI that are needed; null where the process has no interpreter.
struct Python {
  int (*lock)() = find<int()>("PyGILState_Ensure");
  void (*unlock)(int) = find<void(int)>("PyGILState_Release");
  int (*run_signal_handlers)() = find<int()>("PyErr_CheckSignals");
  void (*take_exception)(void**, void**, void**) = find<void(void**, void**, void**)>("PyErr_Fetch");
  void (*raise)(void*, void*, void*) = find<void(void*, void*, void*)>("PyErr_Restore");
  void (*clear_exception)() = find<void()>("PyErr_Clear");

  bool is_there() const { return lock && unlock && run_signal_handlers && take_exception && raise && clear_exception; }

 private:
  template <class Function>
  static Function* find(const char* name) {
    return reinterpret_cast<Function*>(dlsym(RTLD_DEFAULT, name));
  }
};

const Python& python() {
  static const Python found;
  return found;
}

struct Exception {
  void *type = nullptr, *value = nullptr, *traceback = nullptr;
};

// A handler's, on its way to innerloop_raise_interrupt(); used under the interpreter's lock alone.
Exception pending;

void raise_pending() {
  if (pending.type) python().raise(pending.type, pending.value, pending.traceback);
  pending = {};
}

constexpr std::chrono::milliseconds between_looks{100};

}  // namespace

// Handlers run on the main thread, whose number is the process's.
SignalWatch::SignalWatch()
    : watching_(python().is_there() && syscall(SYS_gettid) == getpid()), next_(Clock::now() + between_looks) {}

void SignalWatch::check() {
  if (!watching_ || Clock::now() < next_) return;
  const Python& interpreter = python();
  const int state = interpreter.lock();
  const bool raised = interpreter.run_signal_handlers() != 0;
  if (raised) {
    Exception fresh;
    interpreter.take_exception(&fresh.type, &fresh.value, &fresh.traceback);
    raise_pending();  // of an earlier call whose caller did not ask
    interpreter.clear_exception();
    pending = fresh;
  }
  interpreter.unlock(state);
  if (raised) throw Interrupted();
  next_ = Clock::now() + between_looks;
}

}  // namespace innerloop

// Called by Python (ops/maml.py) after a call that ended with Interrupted: raises what the signal handler raised.
extern "C" __attribute__((visibility("default"))) void innerloop_raise_interrupt() {
  innerloop::raise_pending();
}
