// class_logsumexp: the logarithm of the attention that the samples of each class receive together.
#include "kernels/class_logsumexp.h"

#include <torch/csrc/stable/library.h>

#include "ops/class_logsumexp.h"
#include "ops/parallel.h"

namespace innerloop {
namespace {

Tensor class_logsumexp_cpu(Tensor scores, Tensor labels, int64_t num_classes) {
  const auto [a, y, tasks, queries, samples, classes] = checked_class_logsumexp(scores, labels, num_classes);
  check_label_values(y, classes);
  Tensor out = torch::stable::new_empty(a, {tasks, queries, classes});
  for_type(a, [&]<class T>(T) {
    const T* from = a.const_data_ptr<T>();
    const int64_t* label = y.const_data_ptr<int64_t>();
    T* to = out.mutable_data_ptr<T>();
    for_blocks(tasks, queries, rows_a_block, product(10, samples), [&](int64_t t, int64_t first, int64_t last) {
      const int64_t row = t * queries + first;
      INNERLOOP_CALL(class_logsumexp, from + row * samples, label + t * samples, last - first, samples, classes,
                     to + row * classes);
    });
  });
  return out;
}

}  // namespace
}  // namespace innerloop

STABLE_TORCH_LIBRARY_FRAGMENT(innerloop, m) {
  m.def("class_logsumexp(Tensor scores, Tensor labels, int num_classes) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(innerloop, CPU, m) {
  m.impl("class_logsumexp", TORCH_BOX(&innerloop::class_logsumexp_cpu));
}
