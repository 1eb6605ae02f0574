#include "engine/lanes.h"

#include "engine/lane_executor.h"

namespace innerloop::INNERLOOP_ISA {
namespace {

// Of the tasks beyond the last full vector: whether each is spread over the lanes by itself. Else they share a vector,
// which costs as much as a full one.
template <class T>
bool spreads_rest(const Request<T>& request) {
  // In rows of samples; of a spread task, the sums over lanes for its gradients are worth about so many.
  constexpr int64_t sums = 3;
  const auto rows = [](int64_t samples) { return LaneTasks<T>{.spread = true}.rows(samples); };
  const int64_t S = request.support.count, Q = request.query.count;
  return request.tasks % lane_count<T> * (rows(S) + rows(Q) + sums) <= S + Q;
}

template <class T>
int64_t chunks_of(const Request<T>& request) {
  const int64_t full = request.tasks / lane_count<T>, rest = request.tasks % lane_count<T>;
  return full + (spreads_rest(request) ? rest : rest > 0);
}

template <class T>
LaneTasks<T> tasks_of_chunk(const Request<T>& request, int64_t chunk) {
  constexpr int64_t width = lane_count<T>;
  const int64_t full = request.tasks / width;
  if (chunk >= full && spreads_rest(request)) return {full * width + chunk - full, 1, true};
  return {chunk * width, std::min(request.tasks - chunk * width, width), false};
}

template <class T>
class LanesEngine final : public Engine<T> {
 public:
  explicit LanesEngine(const Request<T>& request) : shared_(request) {}

  int64_t chunks() const override { return chunks_of(shared_.request); }
  std::unique_ptr<Worker> make_worker() override;

  std::string plan_text() const override {
    std::string text;
    for (size_t l = 0; l < shared_.chain.size(); ++l) {
      const ChainLayer& layer = shared_.chain[l];
      text += "linear " + std::to_string(layer.inputs) + " → " + std::to_string(layer.outputs);
      if (layer.activation) text += std::string(", ") + kind_name(layer.activation->kind);
      text += ": lanes, " + std::to_string(lane_count<T>) + " tasks a vector";
      if (l < shared_.fixed_layers) text += " (not adapted: once a task)";
      text += "\n";
    }
    const int64_t rest = shared_.request.tasks % lane_count<T>;
    if (rest > 0 && spreads_rest(shared_.request)) {
      text += "the last " + std::to_string(rest) + " of the tasks: one at a time, their samples in the lanes\n";
    }
    return text;
  }

 private:
  LanesShared<T> shared_;
};

template <class T>
class LanesWorker final : public Worker {
 public:
  explicit LanesWorker(LanesShared<T>& shared) : request_(shared.request), executor_(shared, arena_) {}

  void run(int64_t chunk) override { executor_.run(tasks_of_chunk(request_, chunk)); }

  void add_shared() override { executor_.add_shared(); }

 private:
  const Request<T>& request_;
  Arena arena_;
  LaneExecutor<T> executor_;
};

template <class T>
std::unique_ptr<Worker> LanesEngine<T>::make_worker() {
  return std::make_unique<LanesWorker<T>>(shared_);
}

}  // namespace

template <class T>
bool lanes_apply(const Request<T>& request) {
  return chain_of(*request.program).has_value();
}

template <class T>
bool lanes_pay(const Request<T>& request) {
  constexpr int64_t widest_paying = 100;
  const Program& program = *request.program;
  for (const Shape& value : program.values) {
    if (value.size() > widest_paying) return false;
  }
  if (4 * request.tasks >= 3 * lane_count<T>) return true;
  // Lanes without a task of their own cost as much as the others: of large parameters, more than vectors half full.
  constexpr int64_t most_paying = 2500;
  int64_t numbers = 0;
  for (int p = 0; p < static_cast<int>(program.parameters.size()); ++p) numbers += program.parameter_size(p);
  return numbers <= most_paying;
}

template <class T>
std::unique_ptr<Engine<T>> make_lanes_engine(const Request<T>& request) {
  return std::make_unique<LanesEngine<T>>(request);
}

template bool lanes_apply(const Request<float>&);
template bool lanes_apply(const Request<double>&);
template bool lanes_pay(const Request<float>&);
template bool lanes_pay(const Request<double>&);
template std::unique_ptr<Engine<float>> make_lanes_engine(const Request<float>&);
template std::unique_ptr<Engine<double>> make_lanes_engine(const Request<double>&);

}  // namespace innerloop::INNERLOOP_ISA
