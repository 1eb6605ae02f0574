// class_logsumexp on CUDA.
#include "cuda/launch.h"
#include "ops/class_logsumexp.h"

namespace innerloop {
namespace {

// A thread for each element of out [tasks, queries, classes], which goes through the scores of the samples of its class
// twice. A class without a sample, or with scores of −∞ alone, gets −∞; a label outside 0 … classes - 1 is of none.
template <class T>
__global__ void class_logsumexp_kernel(const T* scores, const int64_t* labels, int64_t tasks, int64_t queries,
                                       int64_t samples, int64_t classes, T* out) {
  const int64_t items = tasks * queries * classes, step = int64_t{blockDim.x} * gridDim.x;
  for (int64_t item = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; item < items; item += step) {
    const int64_t c = item % classes, row = item / classes;
    const T* score = scores + row * samples;
    const int64_t* label = labels + row / queries * samples;
    T top = -infinity<T>;
    for (int64_t s = 0; s < samples; ++s) {
      if (label[s] == c && !(score[s] <= top)) top = score[s];  // NaN stays
    }
    T sum = 0;
    for (int64_t s = 0; s < samples && top != -infinity<T>; ++s) {
      if (label[s] == c) sum += std::exp(score[s] - top);
    }
    out[item] = top + std::log(sum);
  }
}

Tensor class_logsumexp_cuda(Tensor scores, Tensor labels, int64_t num_classes) {
  const ClassLogsumexp n = checked_class_logsumexp(scores, labels, num_classes);
  const Device device(n.scores, "class_logsumexp");
  Tensor out = torch::stable::new_empty(n.scores, {n.tasks, n.queries, n.classes});
  for_type(n.scores, [&]<class T>(T) {
    device.launch(class_logsumexp_kernel<T>, grid_for(n.tasks * n.queries * n.classes), threads_a_block, 0,
                  n.scores.const_data_ptr<T>(), n.labels.const_data_ptr<int64_t>(), n.tasks, n.queries, n.samples,
                  n.classes, out.mutable_data_ptr<T>());
  });
  return out;
}

}  // namespace
}  // namespace innerloop

INNERLOOP_CUDA_OPS(m) {
  m.impl("class_logsumexp", TORCH_BOX(&innerloop::class_logsumexp_cuda));
}
