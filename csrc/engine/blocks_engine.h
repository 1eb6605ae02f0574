// What the workers of one call of the blocks executor share.
#pragma once

#include <algorithm>
#include <memory>
#include <string>
#include <vector>

#include "engine/items.h"
#include "engine/packed.h"
#include "engine/pass_memory.h"
#include "engine/plan.h"

namespace innerloop::INNERLOOP_ISA {

// The plan, θ₀ and α packed, and the sums over tasks.
template <class T>
class BlocksEngine final : public Engine<T> {
 public:
  explicit BlocksEngine(const Request<T>& call)
      : request(call), plan(make_plan(call)), tasks_per_chunk(chunk_of(plan, call)) {
    initial.assign(static_cast<size_t>(plan.packed_size) + 2 * lanes<T>, T(0));
    total = initial;
    for (size_t p = 0; p < plan.parameters.size(); ++p) {
      const PackedParameter& parameter = plan.parameters[p];
      const bool is_read = parameter.offset >= 0;
      const bool is_adapted = is_read && request.is_adapted(static_cast<int>(p));
      rates.push_back(is_adapted ? PackedRate<T>(request.rates[p], parameter, request.steps) : PackedRate<T>());
      if (is_read && !request.parameters[p].per_task) pack(request.parameters[p].data, parameter, initial.data());
      const bool is_owned = plan.owners[p] >= 0;
      if (is_adapted && !is_owned) adapted.push_back(static_cast<int>(p));
      if (is_read && plan.tracked[p] && !is_owned) tracked.push_back(static_cast<int>(p));
      if (is_read && !request.gradients.empty() && request.gradients[p]) results.push_back(static_cast<int>(p));
      const bool learns_rate = is_adapted && !request.rate_gradients.empty() && request.rate_gradients[p];
      if (learns_rate) learned_rates.push_back(static_cast<int>(p));
      rate_totals.emplace_back(learns_rate ? rates[p].size() : 0, T(0));
    }
  }

  int64_t chunks() const override { return (request.tasks + tasks_per_chunk - 1) / tasks_per_chunk; }
  std::unique_ptr<Worker> make_worker() override;
  std::string plan_text() const override { return describe(plan) + describe_support_passes(plan, request); }

  void finish() override {
    for (const int p : results) {
      if (!at(request.parameters, p).per_task) {
        unpack(total.data(), at(plan.parameters, p), request.gradient_scale, at(request.gradients, p));
      }
    }
    for (const int p : learned_rates) {
      at(rates, p).unpack(at(rate_totals, p).data(), at(plan.parameters, p), request.gradient_scale,
                          at(request.rate_gradients, p));
    }
  }

  const Request<T>& request;
  const Plan plan;
  const int64_t tasks_per_chunk;
  std::vector<T> initial;  // θ₀, packed; zero where each task has its own
  std::vector<PackedRate<T>> rates;
  // Parameters that the inner loop adapts, that v follows (of both those that no layer stands for itself), whose
  // gradient and whose α's gradient is a result.
  std::vector<int> adapted, tracked, results, learned_rates;
  std::vector<T> total;  // the sum of v_0 over tasks, packed
  std::vector<std::vector<T>> rate_totals;

 private:
  // One task; but where a layer stands for its weight itself, the sum over tasks is the one array of that size that a
  // task still passes over: then several, as long as there is work for eight threads.
  static int64_t chunk_of(const Plan& plan, const Request<T>& call) {
    const bool has_owner = plan.moving_size < plan.packed_size;
    const bool all_shared = std::ranges::none_of(call.parameters, [](const auto& p) { return p.per_task; });
    return has_owner && all_shared ? std::clamp<int64_t>(call.tasks / 8, 1, 4) : 1;
  }
};

}  // namespace innerloop::INNERLOOP_ISA
