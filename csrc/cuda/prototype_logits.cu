// prototype_logits and prototype_loss on CUDA: class means, distances to them and their cross-entropy, launched one
// after another without waiting for the device, and the gradient of both embeddings.
#include <optional>
#include <tuple>

#include "cuda/block.h"
#include "cuda/class_means.h"
#include "cuda/distance_gradient.h"
#include "cuda/pair_sums.h"
#include "ops/prototype_logits.h"

namespace innerloop {
namespace {

struct Logits {
  Tensor logits;   // [T, Q, N]
  Tensor means;    // [T, N, D]
  Tensor weights;  // [T, N]
};

Logits logits_of(const Device& device, const PrototypeLogits& n, double temperature) {
  Logits found{torch::stable::new_empty(n.queries, {n.tasks, n.rows, n.classes}),
               torch::stable::new_empty(n.queries, {n.tasks, n.classes, n.dim}),
               torch::stable::new_empty(n.queries, {n.tasks, n.classes})};
  for_type(n.queries, [&]<class T>(T) {
    T* means = found.means.mutable_data_ptr<T>();
    class_means(device, n.support.const_data_ptr<T>(), n.labels.const_data_ptr<int64_t>(), n.tasks, n.samples,
                n.classes, n.dim, means, found.weights.mutable_data_ptr<T>());
    const Rows<T> rows{n.queries.const_data_ptr<T>(), n.rows, n.dim, n.rows * n.dim};
    const Rows<T> points{means, n.classes, n.dim, n.classes * n.dim};
    pair_sums<SquaredDifference>(device, rows, points, n.tasks, n.dim, static_cast<T>(-1 / temperature),
                                 found.logits.mutable_data_ptr<T>());
  });
  return found;
}

std::tuple<Tensor, Tensor, Tensor> prototype_logits_cuda(Tensor support, Tensor labels, Tensor queries,
                                                         int64_t num_classes, double temperature) {
  const PrototypeLogits n = checked_prototype_logits(support, labels, queries, num_classes, temperature);
  const Device device(n.queries, "prototype_logits");
  const Logits found = logits_of(device, n, temperature);
  return {found.logits, found.means, found.weights};
}

// A block for each task, whose threads go through its queries: losses [tasks], the mean of −log softmax(logits)[label]
// over the queries that have one of the classes, and its gradient for the logits [tasks, queries, classes].
template <class T>
__global__ void cross_entropy_kernel(const T* logits, const int64_t* labels, int64_t tasks, int64_t queries,
                                     int64_t classes, T* losses, T* gradient) {
  double* memory = shared_memory<double>();
  for (int64_t t = blockIdx.x; t < tasks; t += gridDim.x) {
    const int64_t* label = labels + t * queries;
    const auto counts = [&](int64_t q) { return label[q] >= 0 && label[q] < classes; };
    double own = 0;
    for (int64_t q = threadIdx.x; q < queries; q += blockDim.x) own += counts(q) ? 1 : 0;
    const double count = block_sum(own, memory);
    const T weight = static_cast<T>(1 / count);
    double loss = 0;
    for (int64_t q = threadIdx.x; q < queries; q += blockDim.x) {
      const T* row = logits + (t * queries + q) * classes;
      T* to = gradient + (t * queries + q) * classes;
      T top = -infinity<T>;
      for (int64_t c = 0; c < classes; ++c) top = row[c] > top ? row[c] : top;
      T sum = 0;
      for (int64_t c = 0; c < classes; ++c) sum += std::exp(row[c] - top);
      const T factor = counts(q) ? weight / sum : T(0);
      for (int64_t c = 0; c < classes; ++c) to[c] = factor * std::exp(row[c] - top);
      if (!counts(q)) continue;
      to[label[q]] -= weight;
      loss += static_cast<double>(top - row[label[q]]) + static_cast<double>(std::log(sum));
    }
    loss = block_sum(loss, memory);
    if (threadIdx.x == 0) losses[t] = static_cast<T>(loss / count);
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> prototype_loss_cuda(Tensor support, Tensor labels, Tensor queries,
                                                                       Tensor query_labels, int64_t num_classes,
                                                                       double temperature) {
  const PrototypeLogits n = checked_prototype_logits(support, labels, queries, num_classes, temperature);
  const Tensor wanted = shaped_labels(query_labels, queries, n.tasks, n.rows, "query_labels");
  const Device device(n.queries, "prototype_loss");
  const Logits found = logits_of(device, n, temperature);
  Tensor losses = torch::stable::new_empty(n.queries, {n.tasks});
  Tensor gradient = torch::stable::empty_like(found.logits);
  for_type(n.queries, [&]<class T>(T) {
    device.launch(cross_entropy_kernel<T>, grid_for(n.tasks, 1), threads_a_block, threads_a_block * sizeof(double),
                  found.logits.const_data_ptr<T>(), wanted.const_data_ptr<int64_t>(), n.tasks, n.rows, n.classes,
                  losses.mutable_data_ptr<T>(), gradient.mutable_data_ptr<T>());
  });
  return {losses, found.logits, gradient, found.means, found.weights};
}

std::tuple<Tensor, Tensor> prototype_logits_backward_cuda(Tensor gradient, std::optional<Tensor> scale, Tensor labels,
                                                          Tensor queries, Tensor means, Tensor weights,
                                                          double temperature) {
  const PrototypeLogitsBackward n =
      checked_prototype_logits_backward(gradient, scale, labels, queries, means, weights, temperature);
  const Device device(n.queries, "prototype_logits_backward");
  Tensor grad_support = torch::stable::new_empty(n.queries, {n.tasks, n.samples, n.dim});
  Tensor grad_means = torch::stable::empty_like(n.means);
  Tensor grad_queries = torch::stable::empty_like(n.queries);
  for_type(n.queries, [&]<class T>(T) {
    T* to_means = grad_means.mutable_data_ptr<T>();
    const T* factors = n.scale ? n.scale->const_data_ptr<T>() : nullptr;
    distance_gradient(device, n.gradient.const_data_ptr<T>(), factors, static_cast<T>(-1 / temperature),
                      n.queries.const_data_ptr<T>(), n.means.const_data_ptr<T>(), n.tasks, n.rows, n.classes, n.dim,
                      grad_queries.mutable_data_ptr<T>(), to_means);
    const T* of_means = to_means;
    class_means_backward(device, of_means, n.weights.const_data_ptr<T>(), n.labels.const_data_ptr<int64_t>(), n.tasks,
                         n.samples, n.classes, n.dim, grad_support.mutable_data_ptr<T>());
  });
  return {grad_support, grad_queries};
}

}  // namespace
}  // namespace innerloop

INNERLOOP_CUDA_OPS(m) {
  m.impl("prototype_logits", TORCH_BOX(&innerloop::prototype_logits_cuda));
  m.impl("prototype_loss", TORCH_BOX(&innerloop::prototype_loss_cuda));
  m.impl("prototype_logits_backward", TORCH_BOX(&innerloop::prototype_logits_backward_cuda));
}
