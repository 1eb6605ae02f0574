// prototype_logits and prototype_loss: class means, the distances of the queries to them and their cross-entropy in one
// pass over each task, and the gradient of both embeddings in another.
#include "ops/prototype_logits.h"

#include <torch/csrc/stable/library.h>

#include <limits>
#include <optional>
#include <tuple>
#include <vector>

#include "kernels/distance.h"
#include "kernels/prototypes.h"
#include "ops/large_output.h"
#include "ops/parallel.h"

namespace innerloop {
namespace {

// The prototypes of all tasks.
struct Prototypes {
  Tensor means;    // [T, N, D]
  Tensor weights;  // [T, N], 1 / number of samples of the class
};

template <class T>
Prototypes find_prototypes(const PrototypeLogits& n) {
  const Tensor &support = n.support, &labels = n.labels;
  Prototypes found{torch::stable::new_empty(support, {n.tasks, n.classes, n.dim}),
                   torch::stable::new_empty(support, {n.tasks, n.classes})};
  const T* from = support.const_data_ptr<T>();
  const int64_t* label = labels.const_data_ptr<int64_t>();
  T* means = found.means.mutable_data_ptr<T>();
  T* weights = found.weights.mutable_data_ptr<T>();
  torch::stable::parallel_for(0, n.tasks, grain(product(n.samples, n.dim)), [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      INNERLOOP_CALL(class_means, from + t * n.samples * n.dim, label + t * n.samples, n.samples, n.classes, n.dim,
                     means + t * n.classes * n.dim, weights + t * n.classes);
    }
  });
  return found;
}

// (logits [T, Q, N], means [T, N, D], weights [T, N])
std::tuple<Tensor, Tensor, Tensor> prototype_logits_cpu(Tensor support, Tensor labels, Tensor queries,
                                                        int64_t num_classes, double temperature) {
  const PrototypeLogits n = checked_prototype_logits(support, labels, queries, num_classes, temperature);
  check_label_values(n.labels, n.classes);
  const Tensor& q = n.queries;
  Tensor logits = torch::stable::new_empty(q, {n.tasks, n.rows, n.classes});
  std::optional<Prototypes> found;
  for_type(q, [&]<class T>(T) {
    found = find_prototypes<T>(n);
    const T* rows = q.const_data_ptr<T>();
    const T* means = found->means.const_data_ptr<T>();
    T* out = logits.mutable_data_ptr<T>();
    for_blocks(n.tasks, n.rows, rows_a_block, product(n.classes, n.dim), [&](int64_t t, int64_t first, int64_t last) {
      const int64_t row = t * n.rows + first;
      INNERLOOP_CALL(squared_distances, rows + row * n.dim, means + t * n.classes * n.dim, last - first, n.classes,
                     n.dim, static_cast<T>(-1 / temperature), out + row * n.classes);
    });
  });
  return {logits, found->means, found->weights};
}

// (losses [T], logits [T, Q, N], the gradient of each task's loss for its logits [T, Q, N], means, weights)
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> prototype_loss_cpu(Tensor support, Tensor labels, Tensor queries,
                                                                      Tensor query_labels, int64_t num_classes,
                                                                      double temperature) {
  const PrototypeLogits n = checked_prototype_logits(support, labels, queries, num_classes, temperature);
  check_label_values(n.labels, n.classes);
  const Tensor z = shaped_labels(query_labels, queries, n.tasks, n.rows, "query_labels");
  check_label_values(z, n.classes, "query_labels");
  const Tensor& q = n.queries;
  Tensor losses = torch::stable::new_empty(q, {n.tasks});
  Tensor logits = torch::stable::new_empty(q, {n.tasks, n.rows, n.classes});
  Tensor gradient = torch::stable::new_empty(q, {n.tasks, n.rows, n.classes});
  const int64_t* label = z.const_data_ptr<int64_t>();
  std::vector<double> counts(static_cast<size_t>(n.tasks));
  for (int64_t t = 0; t < n.tasks; ++t) {
    for (int64_t i = 0; i < n.rows; ++i) counts[static_cast<size_t>(t)] += label[t * n.rows + i] >= 0;
  }
  const int64_t blocks = (n.rows + rows_a_block - 1) / rows_a_block;
  std::vector<double> sums(static_cast<size_t>(n.tasks * blocks));
  std::optional<Prototypes> found;
  for_type(q, [&]<class T>(T) {
    found = find_prototypes<T>(n);
    const T* rows = q.const_data_ptr<T>();
    const T* means = found->means.const_data_ptr<T>();
    T* to_logits = logits.mutable_data_ptr<T>();
    T* to_gradient = gradient.mutable_data_ptr<T>();
    for_blocks(n.tasks, n.rows, rows_a_block, product(n.classes, n.dim), [&](int64_t t, int64_t first, int64_t last) {
      const int64_t row = t * n.rows + first;
      sums[static_cast<size_t>(t * blocks + first / rows_a_block)] = INNERLOOP_CALL(
          squared_distances_loss, rows + row * n.dim, means + t * n.classes * n.dim, last - first, n.classes, n.dim,
          static_cast<T>(-1 / temperature), label + row, static_cast<T>(1 / counts[static_cast<size_t>(t)]),
          to_logits + row * n.classes, to_gradient + row * n.classes);
    });
    T* loss = losses.mutable_data_ptr<T>();
    for (int64_t t = 0; t < n.tasks; ++t) {
      double sum = 0;
      for (int64_t i = 0; i < blocks; ++i) sum += sums[static_cast<size_t>(t * blocks + i)];
      loss[t] = static_cast<T>(sum / counts[static_cast<size_t>(t)]);
    }
  });
  return {losses, logits, gradient, found->means, found->weights};
}

// The gradients of support and queries, from that of the logits, gradient [T, Q, N], times scale [T].
std::tuple<Tensor, Tensor> prototype_logits_backward_cpu(Tensor gradient, std::optional<Tensor> scale, Tensor labels,
                                                         Tensor queries, Tensor means, Tensor weights,
                                                         double temperature) {
  const PrototypeLogitsBackward n =
      checked_prototype_logits_backward(gradient, scale, labels, queries, means, weights, temperature);
  check_label_values(n.labels, n.classes);
  const Tensor& q = n.queries;
  const int64_t samples = n.samples;
  Tensor grad_support = torch::stable::new_empty(q, {n.tasks, samples, n.dim});
  Tensor grad_means = torch::stable::new_empty(q, {n.tasks, n.classes, n.dim});
  Tensor grad_queries = torch::stable::empty_like(q);
  want_huge_pages(grad_support);
  want_huge_pages(grad_queries);
  const bool nontemporal = exceeds_caches(grad_queries);
  for_type(q, [&]<class T>(T) {
    const T* upstream = n.gradient.const_data_ptr<T>();
    const T* a = q.const_data_ptr<T>();
    const T* b = n.means.const_data_ptr<T>();
    const T* weight = n.weights.const_data_ptr<T>();
    const int64_t* label = n.labels.const_data_ptr<int64_t>();
    const T* factor = n.scale ? n.scale->const_data_ptr<T>() : nullptr;
    T* to_queries = grad_queries.mutable_data_ptr<T>();
    T* to_means = grad_means.mutable_data_ptr<T>();
    T* to_support = grad_support.mutable_data_ptr<T>();
    for_blocks(
        n.tasks, n.dim, columns_a_block, product(2, n.rows, n.classes), [&](int64_t i, int64_t first, int64_t last) {
          const int64_t t = n.tasks - 1 - i;  // the loss has read these queries last: they may still be in a cache
          const int64_t row = t * n.rows, mean = t * n.classes;
          const double by = (factor == nullptr ? 1 : static_cast<double>(factor[t])) * -1 / temperature;
          INNERLOOP_CALL(squared_distances_backward, upstream + row * n.classes, static_cast<T>(by), a + row * n.dim,
                         b + mean * n.dim, n.rows, n.classes, n.dim, first, last, nontemporal, to_queries + row * n.dim,
                         to_means + mean * n.dim);
          INNERLOOP_CALL(class_means_backward, to_means + mean * n.dim, weight + mean, label + t * samples, samples,
                         n.dim, first, last, nontemporal, to_support + t * samples * n.dim);
        });
  });
  return {grad_support, grad_queries};
}

}  // namespace
}  // namespace innerloop

STABLE_TORCH_LIBRARY_FRAGMENT(innerloop, m) {
  m.def(
      "prototype_logits(Tensor support, Tensor labels, Tensor queries, int num_classes, float temperature)"
      " -> (Tensor, Tensor, Tensor)");
  m.def(
      "prototype_loss(Tensor support, Tensor labels, Tensor queries, Tensor query_labels, int num_classes,"
      " float temperature) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "prototype_logits_backward(Tensor gradient, Tensor? scale, Tensor labels, Tensor queries, Tensor means,"
      " Tensor weights, float temperature) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(innerloop, CPU, m) {
  m.impl("prototype_logits", TORCH_BOX(&innerloop::prototype_logits_cpu));
  m.impl("prototype_loss", TORCH_BOX(&innerloop::prototype_loss_cpu));
  m.impl("prototype_logits_backward", TORCH_BOX(&innerloop::prototype_logits_backward_cpu));
}
