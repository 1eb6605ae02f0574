// prototypes: the mean embedding of each class of each task, and its transpose.
#include "kernels/prototypes.h"

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "ops/large_output.h"
#include "ops/parallel.h"
#include "ops/prototypes.h"

namespace innerloop {
namespace {

// (means [T, N, D], 1 / number of samples of each class [T, N])
std::tuple<Tensor, Tensor> prototypes_cpu(Tensor embeddings, Tensor labels, int64_t num_classes) {
  const auto [x, y, tasks, samples, classes, dim] = checked_prototypes(embeddings, labels, num_classes);
  check_label_values(y, classes);
  Tensor means = torch::stable::new_empty(x, {tasks, classes, dim});
  Tensor weights = torch::stable::new_empty(x, {tasks, classes});
  for_type(x, [&]<class T>(T) {
    const T* from = x.const_data_ptr<T>();
    const int64_t* label = y.const_data_ptr<int64_t>();
    T* to = means.mutable_data_ptr<T>();
    T* weight = weights.mutable_data_ptr<T>();
    torch::stable::parallel_for(0, tasks, grain(product(samples, dim)), [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) {
        INNERLOOP_CALL(class_means, from + t * samples * dim, label + t * samples, samples, classes, dim,
                       to + t * classes * dim, weight + t * classes);
      }
    });
  });
  return {means, weights};
}

Tensor prototypes_backward_cpu(Tensor gradient, Tensor weights, Tensor labels) {
  const auto [g, w, y, tasks, samples, classes, dim] = checked_prototypes_backward(gradient, weights, labels);
  check_label_values(y, classes);
  Tensor out = torch::stable::new_empty(g, {tasks, samples, dim});
  const bool nontemporal = exceeds_caches(out);
  for_type(g, [&]<class T>(T) {
    const T* from = g.const_data_ptr<T>();
    const T* weight = w.const_data_ptr<T>();
    const int64_t* label = y.const_data_ptr<int64_t>();
    T* to = out.mutable_data_ptr<T>();
    torch::stable::parallel_for(0, tasks, grain(product(samples, dim)), [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) {
        INNERLOOP_CALL(class_means_backward, from + t * classes * dim, weight + t * classes, label + t * samples,
                       samples, dim, int64_t{0}, dim, nontemporal, to + t * samples * dim);
      }
    });
  });
  return out;
}

}  // namespace
}  // namespace innerloop

STABLE_TORCH_LIBRARY_FRAGMENT(innerloop, m) {
  m.def("prototypes(Tensor embeddings, Tensor labels, int num_classes) -> (Tensor, Tensor)");
  m.def("prototypes_backward(Tensor gradient, Tensor weights, Tensor labels) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(innerloop, CPU, m) {
  m.impl("prototypes", TORCH_BOX(&innerloop::prototypes_cpu));
  m.impl("prototypes_backward", TORCH_BOX(&innerloop::prototypes_backward_cpu));
}
