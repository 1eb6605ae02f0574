// inner_update: θ − α ⊙ g for a list of stacked per-task parameters, in one call.
#include "kernels/inner_update.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <vector>

#include "ops/checks.h"

namespace innerloop {
namespace {

std::vector<Tensor> inner_update_cpu(std::vector<Tensor> params, std::vector<Tensor> grads, std::vector<Tensor> lrs) {
  STD_TORCH_CHECK(grads.size() == params.size() && lrs.size() == params.size(),
                  "params, grads and lrs must have the same number of tensors");
  std::vector<Tensor> updated;
  updated.reserve(params.size());
  for (size_t i = 0; i < params.size(); ++i) {
    check_floating(params[i], "params");
    check_floating(grads[i], "grads");
    check_floating(lrs[i], "lrs");
    check_same_type(grads[i], params[i], "grads");
    check_same_type(lrs[i], params[i], "lrs");
    STD_TORCH_CHECK(grads[i].sizes().equals(params[i].sizes()), "grads must have the shapes of params");
    const bool lr_is_array = lrs[i].numel() != 1;
    STD_TORCH_CHECK(!lr_is_array || lrs[i].sizes().equals(params[i].sizes()),
                    "lrs must have one element, or the shapes of params");
    const Tensor param = torch::stable::contiguous(params[i]);
    const Tensor grad = torch::stable::contiguous(grads[i]);
    const Tensor lr = torch::stable::contiguous(lrs[i]);
    updated.push_back(torch::stable::empty_like(param));
    for_type(param, [&]<class T>(T) {
      const T* p = param.const_data_ptr<T>();
      const T* g = grad.const_data_ptr<T>();
      const T* a = lr.const_data_ptr<T>();
      T* out = updated.back().mutable_data_ptr<T>();
      torch::stable::parallel_for(0, param.numel(), grain(1), [&](int64_t begin, int64_t end) {
        const T* rate = lr_is_array ? a + begin : a;
        INNERLOOP_CALL(inner_update, p + begin, g + begin, rate, lr_is_array, out + begin, end - begin);
      });
    });
  }
  return updated;
}

}  // namespace
}  // namespace innerloop

STABLE_TORCH_LIBRARY_FRAGMENT(innerloop, m) {
  m.def("inner_update(Tensor[] params, Tensor[] grads, Tensor[] lrs) -> Tensor[]");
}

STABLE_TORCH_LIBRARY_IMPL(innerloop, CPU, m) {
  m.impl("inner_update", TORCH_BOX(&innerloop::inner_update_cpu));
}
