#include "engine/lanes.h"

#include "engine/lane_executor.h"

namespace innerloop::INNERLOOP_ISA {
namespace {

template <class T>
class LanesEngine final : public Engine<T> {
 public:
  explicit LanesEngine(const Request<T>& request) : shared_(request) {}

  int64_t chunks() const override { return (shared_.request.tasks + width - 1) / width; }
  std::unique_ptr<Worker> make_worker() override;

  void finish() override {
    const Request<T>& request = shared_.request;
    for (const int p : shared_.results) {
      const size_t i = static_cast<size_t>(p);
      if (request.parameters[i].per_task) continue;
      add_up(shared_.total.data() + shared_.offset(p) * width, shared_.size(p), request.gradients[i]);
    }
    for (const int p : shared_.learned_rates) {
      const size_t i = static_cast<size_t>(p);
      add_up(shared_.rate_totals[i].data(), shared_.rate_size(p), request.rate_gradients[i]);
    }
  }

  std::string plan_text() const override {
    std::string text;
    for (size_t l = 0; l < shared_.chain.size(); ++l) {
      const ChainLayer& layer = shared_.chain[l];
      text += "linear " + std::to_string(layer.inputs) + " → " + std::to_string(layer.outputs);
      if (layer.activation) text += std::string(", ") + kind_name(layer.activation->kind);
      text += ": lanes, " + std::to_string(width) + " tasks a vector";
      if (l < shared_.fixed_layers) text += " (not adapted: once a task)";
      text += "\n";
    }
    return text;
  }

 private:
  static constexpr int width = lane_count<T>;

  // The sums over lanes, scaled.
  void add_up(const T* from, int64_t size, T* to) const {
    for (int64_t e = 0; e < size; ++e)
      to[e] += shared_.request.gradient_scale * sum_lanes<T, width>(load_lanes<T, width>(from + e * width));
  }

  LanesShared<T> shared_;
};

template <class T>
class LanesWorker final : public Worker {
 public:
  explicit LanesWorker(LanesShared<T>& shared) : tasks_(shared.request.tasks), executor_(shared, arena_) {}

  void run(int64_t chunk) override {
    const int64_t first = chunk * lane_count<T>;
    executor_.run(first, std::min<int64_t>(tasks_ - first, lane_count<T>));
  }

  void add_shared() override { executor_.add_shared(); }

 private:
  const int64_t tasks_;
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
int64_t tasks_for_lanes(const Request<T>& request) {
  constexpr int64_t widest_paying = 100, least_tasks = 3 * lane_count<T> / 4;
  for (const Shape& value : request.program->values) {
    if (value.size() > widest_paying) return 0;
  }
  if (request.tasks < least_tasks) return 0;
  // A vector with a task or two costs as much as a full one.
  const int64_t rest = request.tasks % lane_count<T>;
  return 4 * rest <= lane_count<T> ? request.tasks - rest : request.tasks;
}

template <class T>
std::unique_ptr<Engine<T>> make_lanes_engine(const Request<T>& request) {
  return std::make_unique<LanesEngine<T>>(request);
}

template bool lanes_apply(const Request<float>&);
template bool lanes_apply(const Request<double>&);
template int64_t tasks_for_lanes(const Request<float>&);
template int64_t tasks_for_lanes(const Request<double>&);
template std::unique_ptr<Engine<float>> make_lanes_engine(const Request<float>&);
template std::unique_ptr<Engine<double>> make_lanes_engine(const Request<double>&);

}  // namespace innerloop::INNERLOOP_ISA
