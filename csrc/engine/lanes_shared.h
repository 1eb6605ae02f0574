// What the workers of one call share on the lanes executor: the chain, and what is wanted of it.
#pragma once

#include <algorithm>
#include <vector>

#include "engine/chain.h"
#include "engine/items.h"
#include "engine/lane_kernels.h"

namespace innerloop::INNERLOOP_ISA {

template <class T>
struct LanesShared {
  explicit LanesShared(const Request<T>& call) : request(call), chain(*chain_of(*call.program)) {
    fixed_layers = lowest_tracked = chain.size();
    layers_of_.resize(request.parameters.size());
    for (size_t l = 0; l < chain.size(); ++l) {
      for (const int p : {chain[l].weight, chain[l].bias}) {
        if (p < 0) continue;
        at(layers_of_, p) = l;
        if (request.is_adapted(p)) fixed_layers = std::min(fixed_layers, l);
      }
    }
    for (size_t i = 0; i < request.parameters.size(); ++i) {
      const int p = static_cast<int>(i);
      const bool is_adapted = request.is_adapted(p);
      const bool is_result = !request.gradients.empty() && request.gradients[i];
      const bool learns_rate = is_adapted && !request.rate_gradients.empty() && request.rate_gradients[i];
      offsets.push_back(parameters_size);
      parameters_size += size(p);
      tracked.push_back(is_result || (is_adapted && request.wants_gradients()));
      if (is_adapted) adapted.push_back(p);
      if (is_result) results.push_back(p);
      if (learns_rate) learned_rates.push_back(p);
      if (tracked.back()) lowest_tracked = std::min(lowest_tracked, layers_of_[i]);
    }
  }

  int64_t size(int parameter) const { return request.program->parameter_size(parameter); }
  int64_t offset(int parameter) const { return at(offsets, parameter); }
  bool is_tracked(int parameter) const { return parameter >= 0 && at(tracked, parameter); }
  size_t layer_of(int parameter) const { return at(layers_of_, parameter); }

  // Elements of an α.
  int64_t rate_size(int parameter) const {
    const RateArgument<T>& rate = at(request.rates, parameter);
    return (rate.per_step ? request.steps : 1) * (rate.per_element ? size(parameter) : 1);
  }

  // Whether every parameter of the layers that move is adapted with the same number at step k.
  bool has_one_rate(int64_t k) const {
    const auto number = [&](int p) {
      const RateArgument<T>& rate = at(request.rates, p);
      return rate.per_element ? nullptr : rate.data + (rate.per_step ? k : 0);
    };
    for (size_t l = fixed_layers; l < chain.size(); ++l) {
      for (const int p : {chain[l].weight, chain[l].bias}) {
        if (p < 0) continue;
        if (!request.is_adapted(p) || !number(p) || *number(p) != *number(adapted[0])) return false;
      }
    }
    return true;
  }

  const Request<T>& request;
  const std::vector<ChainLayer> chain;
  std::vector<int64_t> offsets;  // by parameter: of its first element among all
  int64_t parameters_size = 0;
  std::vector<bool> tracked;  // by parameter: adapted, or its gradient is wanted: v follows it
  // Parameters that the inner loop adapts, whose gradient and whose α's gradient is a result.
  std::vector<int> adapted, results, learned_rates;
  size_t fixed_layers = 0;    // below the lowest layer with an adapted parameter
  size_t lowest_tracked = 0;  // the lowest layer with a tracked one

 private:
  std::vector<size_t> layers_of_;  // by parameter
};

}  // namespace innerloop::INNERLOOP_ISA
