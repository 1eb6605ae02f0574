// One request run by two engines: the first tasks by one, the others by another.
#pragma once

#include <memory>
#include <string>
#include <utility>

#include "engine/request.h"

namespace innerloop::INNERLOOP_ISA {

// The request of tasks first … first + count − 1 alone; its gradients are still shares of the mean over all.
template <class T>
Request<T> part_of(const Request<T>& whole, int64_t first, int64_t count) {
  Request<T> part = whole;
  part.tasks = count;
  const auto move = [](auto& pointer, int64_t distance) {
    if (pointer) pointer += distance;
  };
  const Program& program = *whole.program;
  const int64_t outputs = program.values[static_cast<size_t>(program.output)].size();
  for (Samples<T>* samples : {&part.support, &part.query}) {
    const int64_t skipped = first * samples->count;
    move(samples->x, skipped * program.values[0].size());
    move(samples->labels, skipped);
    move(samples->targets, skipped * outputs);
    move(samples->mask, skipped);
  }
  move(part.task_losses, first);
  move(part.logits, first * part.query.count * outputs);
  for (size_t p = 0; p < part.parameters.size(); ++p) {
    const int64_t skipped = first * program.parameter_size(static_cast<int>(p));
    if (!part.adapted.empty()) move(part.adapted[p], skipped);
    if (!part.products.empty()) move(part.products[p], skipped);
    if (!part.directions.empty()) move(part.directions[p], skipped);
    if (!part.parameters[p].per_task) continue;
    move(part.parameters[p].data, skipped);
    if (!part.gradients.empty()) move(part.gradients[p], skipped);
  }
  return part;
}

template <class T>
class SplitEngine final : public Engine<T> {
 public:
  using Maker = std::unique_ptr<Engine<T>> (*)(const Request<T>&);

  // The first tasks of the request by one engine, the others by another.
  SplitEngine(const Request<T>& request, int64_t first_tasks, Maker make_first, Maker make_second)
      : parts_{part_of(request, 0, first_tasks), part_of(request, first_tasks, request.tasks - first_tasks)},
        engines_{make_first(parts_[0]), make_second(parts_[1])} {}

  int64_t chunks() const override { return engines_[0]->chunks() + engines_[1]->chunks(); }
  std::unique_ptr<Worker> make_worker() override { return std::make_unique<SplitWorker>(*this); }
  void finish() override {
    for (const auto& engine : engines_) engine->finish();
  }
  std::string plan_text() const override {
    return engines_[0]->plan_text() + "the last " + std::to_string(parts_[1].tasks) + " of the tasks:\n" +
           engines_[1]->plan_text();
  }

 private:
  class SplitWorker final : public Worker {
   public:
    explicit SplitWorker(SplitEngine& engine) : engine_(engine) {}

    void run(int64_t chunk) override {
      const int64_t first_chunks = engine_.engines_[0]->chunks();
      latest_ = chunk < first_chunks ? 0 : 1;
      if (!workers_[latest_]) workers_[latest_] = engine_.engines_[latest_]->make_worker();
      workers_[latest_]->run(chunk - (latest_ == 0 ? 0 : first_chunks));
    }

    void add_shared() override { workers_[latest_]->add_shared(); }

   private:
    SplitEngine& engine_;
    std::unique_ptr<Worker> workers_[2];
    size_t latest_ = 0;
  };

  const Request<T> parts_[2];
  const std::unique_ptr<Engine<T>> engines_[2];
};

}  // namespace innerloop::INNERLOOP_ISA
