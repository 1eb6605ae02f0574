// inner_update: θ − α ⊙ g for a list of stacked per-task parameters, in one call.
#include "kernels/inner_update.h"

#include <torch/csrc/stable/library.h>

#include <vector>

#include "ops/inner_update.h"
#include "ops/parallel.h"

namespace innerloop {
namespace {

std::vector<Tensor> inner_update_cpu(std::vector<Tensor> params, std::vector<Tensor> grads, std::vector<Tensor> lrs) {
  InnerUpdate call = checked_inner_update(params, grads, lrs);
  for (size_t i = 0; i < call.params.size(); ++i) {
    const Tensor& param = call.params[i];
    const bool lr_is_array = call.lrs[i].numel() != 1;
    for_type(param, [&]<class T>(T) {
      const T* p = param.const_data_ptr<T>();
      const T* g = call.grads[i].const_data_ptr<T>();
      const T* a = call.lrs[i].const_data_ptr<T>();
      T* out = call.updated[i].mutable_data_ptr<T>();
      torch::stable::parallel_for(0, param.numel(), grain(1), [&](int64_t begin, int64_t end) {
        const T* rate = lr_is_array ? a + begin : a;
        INNERLOOP_CALL(inner_update, p + begin, g + begin, rate, lr_is_array, out + begin, end - begin);
      });
    });
  }
  return call.updated;
}

}  // namespace
}  // namespace innerloop

STABLE_TORCH_LIBRARY_FRAGMENT(innerloop, m) {
  m.def("inner_update(Tensor[] params, Tensor[] grads, Tensor[] lrs) -> Tensor[]");
}

STABLE_TORCH_LIBRARY_IMPL(innerloop, CPU, m) {
  m.impl("inner_update", TORCH_BOX(&innerloop::inner_update_cpu));
}
