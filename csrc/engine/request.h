// What one call asks of the engine: plain memory, checked by csrc/ops/maml.cpp before it gets here.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "kernels/isa.h"
#include "program/program.h"

namespace innerloop {

enum class BatchNormMode : uint8_t { transductive = 0, support = 1, running = 2 };
enum class LossKind : uint8_t { cross_entropy = 0, mse = 1 };
enum class Side : uint8_t { support = 0, query = 1 };
enum class Use : uint8_t { off = 0, automatic = 1, forced = 2 };

// The specialised paths: each has a plain twin, and is used where it applies and pays, or as a test says.
struct Paths {
  Use lanes = Use::automatic, low_rank = Use::automatic, conv_block = Use::automatic, winograd = Use::automatic,
      patch_moments = Use::automatic, kept_passes = Use::automatic;
};

// θ₀ of one parameter, in torch's layout: shared, or one for each task.
template <class T>
struct ParameterArgument {
  const T* data = nullptr;
  bool per_task = false;
};

// α of one parameter: [1 or K, 1 or size]; no data where the parameter is not adapted.
template <class T>
struct RateArgument {
  const T* data = nullptr;
  bool per_step = false, per_element = false;
};

// The support or query sets of all tasks: x [T, samples, *sample], labels [T, samples] or targets [T, samples, out].
template <class T>
struct Samples {
  const T* x = nullptr;
  const int64_t* labels = nullptr;
  const T* targets = nullptr;
  const bool* mask = nullptr;  // [T, samples], null: all valid
  int64_t count = 0;
};

// Symbols as in the recurrence (engine/recurrence.h): K steps, w step_weights, u support_weight.
template <class T>
struct Request {
  const Program* program = nullptr;
  int64_t tasks = 0;
  std::vector<ParameterArgument<T>> parameters;
  std::vector<RateArgument<T>> rates;
  std::vector<const T*> buffers;
  Samples<T> support, query;
  int64_t steps = 0;
  std::vector<T> step_weights;
  T support_weight = 0;
  bool first_order = false;
  BatchNormMode batch_norm = BatchNormMode::transductive;
  LossKind loss = LossKind::cross_entropy;
  T label_smoothing = 0;
  T proximal = 0;  // λ: descent is along gₖ + λ(θₖ − θ₀); of the inner loop alone, without gradients
  Paths paths;

  // By parameter, [T, size]; in place of the recurrence H_support(θ₀)·direction is wanted. Empty: it is not.
  std::vector<const T*> directions;

  // Results. Null pointers: not wanted.
  T* task_losses = nullptr;        // [T]
  T* logits = nullptr;             // [T, Q, out]
  std::vector<T*> gradients;       // by parameter, shared [size] (the sum over tasks is added) or [T, size]
  std::vector<T*> rate_gradients;  // by parameter, in the rate's shape (added)
  std::vector<T*> adapted;         // by parameter, θ_K as [T, size]
  std::vector<T*> products;        // by parameter, of the Hessian and its direction, [T, size] (added)
  T gradient_scale = 0;            // 1 / T: gradients are those of the mean over tasks

  bool wants_gradients() const { return !gradients.empty() || !rate_gradients.empty() || wants_products(); }
  bool wants_products() const { return !products.empty(); }
  bool is_adapted(int parameter) const { return rates[static_cast<size_t>(parameter)].data != nullptr; }
};

// Runs the tasks of a request in fixed chunks. Every thread has a worker of its own; a chunk's results do not depend on
// the worker or on the number of threads.
class Worker {
 public:
  virtual ~Worker() = default;
  // Everything of one chunk that belongs to it alone: losses, logits, per-task results.
  virtual void run(int64_t chunk) = 0;
  // Add what the chunk run last contributes to results that tasks share. Called chunk by chunk in ascending order, one
  // thread at a time.
  virtual void add_shared() = 0;
};

template <class T>
class Engine {
 public:
  virtual ~Engine() = default;
  virtual int64_t chunks() const = 0;
  // Chunks may be run by several workers at once; the engine must outlive them.
  virtual std::unique_ptr<Worker> make_worker() = 0;
  // After the last chunk: whatever remains to be done for results that tasks share.
  virtual void finish() {}
  // One line for each layer: the implementation chosen for it.
  virtual std::string plan_text() const = 0;
};

}  // namespace innerloop

// The engine for a request, which must outlive it.
INNERLOOP_DECLARE(std::unique_ptr<Engine<float>> make_engine(const Request<float>& request))
INNERLOOP_DECLARE(std::unique_ptr<Engine<double>> make_engine(const Request<double>& request))
