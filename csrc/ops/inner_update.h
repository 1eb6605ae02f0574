// The arguments of inner_update.
#pragma once

#include <vector>

#include "ops/checks.h"

namespace innerloop {

// The tensors of a call, contiguous, and new ones for its results.
struct InnerUpdate {
  std::vector<Tensor> params, grads, lrs, updated;
};

inline InnerUpdate checked_inner_update(const std::vector<Tensor>& params, const std::vector<Tensor>& grads,
                                        const std::vector<Tensor>& lrs) {
  STD_TORCH_CHECK(grads.size() == params.size() && lrs.size() == params.size(),
                  "params, grads and lrs must have the same number of tensors");
  InnerUpdate call;
  for (size_t i = 0; i < params.size(); ++i) {
    check_floating(params[i], "params");
    check_floating(grads[i], "grads");
    check_floating(lrs[i], "lrs");
    check_same_device(params[i], params[0], "params");
    check_same_type(grads[i], params[i], "grads");
    check_same_type(lrs[i], params[i], "lrs");
    STD_TORCH_CHECK(grads[i].sizes().equals(params[i].sizes()), "grads must have the shapes of params");
    STD_TORCH_CHECK(lrs[i].numel() == 1 || lrs[i].sizes().equals(params[i].sizes()),
                    "lrs must have one element, or the shapes of params");
    call.params.push_back(torch::stable::contiguous(params[i]));
    call.grads.push_back(torch::stable::contiguous(grads[i]));
    call.lrs.push_back(torch::stable::contiguous(lrs[i]));
    call.updated.push_back(torch::stable::empty_like(call.params[i]));
  }
  return call;
}

}  // namespace innerloop
