// prototypes on CUDA, and its transpose.
#include <tuple>

#include "cuda/class_means.h"
#include "ops/prototypes.h"

namespace innerloop {
namespace {

std::tuple<Tensor, Tensor> prototypes_cuda(Tensor embeddings, Tensor labels, int64_t num_classes) {
  const Prototypes n = checked_prototypes(embeddings, labels, num_classes);
  const Device device(n.embeddings, "prototypes");
  Tensor means = torch::stable::new_empty(n.embeddings, {n.tasks, n.classes, n.dim});
  Tensor weights = torch::stable::new_empty(n.embeddings, {n.tasks, n.classes});
  for_type(n.embeddings, [&]<class T>(T) {
    class_means(device, n.embeddings.const_data_ptr<T>(), n.labels.const_data_ptr<int64_t>(), n.tasks, n.samples,
                n.classes, n.dim, means.mutable_data_ptr<T>(), weights.mutable_data_ptr<T>());
  });
  return {means, weights};
}

Tensor prototypes_backward_cuda(Tensor gradient, Tensor weights, Tensor labels) {
  const PrototypesBackward n = checked_prototypes_backward(gradient, weights, labels);
  const Device device(n.gradient, "prototypes_backward");
  Tensor out = torch::stable::new_empty(n.gradient, {n.tasks, n.samples, n.dim});
  for_type(n.gradient, [&]<class T>(T) {
    class_means_backward(device, n.gradient.const_data_ptr<T>(), n.weights.const_data_ptr<T>(),
                         n.labels.const_data_ptr<int64_t>(), n.tasks, n.samples, n.classes, n.dim,
                         out.mutable_data_ptr<T>());
  });
  return out;
}

}  // namespace
}  // namespace innerloop

INNERLOOP_CUDA_OPS(m) {
  m.impl("prototypes", TORCH_BOX(&innerloop::prototypes_cuda));
  m.impl("prototypes_backward", TORCH_BOX(&innerloop::prototypes_backward_cuda));
}
