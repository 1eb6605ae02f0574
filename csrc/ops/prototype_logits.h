// The arguments of prototype_logits, prototype_loss and their backward.
#pragma once

#include <optional>
#include <utility>

#include "ops/checks.h"

namespace innerloop {

struct PrototypeLogits {
  Tensor support, labels, queries;
  int64_t tasks, samples, rows, classes, dim;  // T, S, Q, N, D
};

inline void check_embeddings(const Tensor& support, const char* name, const Tensor& queries, int64_t num_classes,
                             double temperature) {
  check_floating(support, name);
  check_floating(queries, "queries");
  check_same_type(queries, support, "queries");
  check_dims(support, 3, name);
  check_dims(queries, 3, "queries");
  check_size(queries, 0, support.size(0), "queries");
  check_size(queries, 2, support.size(2), "queries");
  STD_TORCH_CHECK(num_classes >= 0, "num_classes must be at least 0");
  STD_TORCH_CHECK(temperature > 0, "temperature must be positive");
}

inline PrototypeLogits checked_prototype_logits(const Tensor& support, const Tensor& labels, const Tensor& queries,
                                                int64_t num_classes, double temperature) {
  check_embeddings(support, "support", queries, num_classes, temperature);
  const int64_t tasks = support.size(0), samples = support.size(1);
  return {torch::stable::contiguous(support),
          shaped_labels(labels, support, tasks, samples),
          torch::stable::contiguous(queries),
          tasks,
          samples,
          queries.size(1),
          num_classes,
          support.size(2)};
}

struct PrototypeLogitsBackward {
  Tensor gradient;              // of the logits [T, Q, N]
  std::optional<Tensor> scale;  // by which each task's gradient counts [T]
  Tensor labels, queries, means, weights;
  int64_t tasks, samples, rows, classes, dim;
};

inline PrototypeLogitsBackward checked_prototype_logits_backward(const Tensor& gradient,
                                                                 const std::optional<Tensor>& scale,
                                                                 const Tensor& labels, const Tensor& queries,
                                                                 const Tensor& means, const Tensor& weights,
                                                                 double temperature) {
  check_dims(means, 3, "means");
  const int64_t tasks = means.size(0), classes = means.size(1);
  check_embeddings(means, "means", queries, classes, temperature);
  for (const auto& [tensor, name] : {std::pair(gradient, "gradient"), std::pair(weights, "weights")}) {
    check_floating(tensor, name);
    check_same_type(tensor, means, name);
  }
  check_dims(gradient, 3, "gradient");
  check_size(gradient, 0, tasks, "gradient");
  check_size(gradient, 1, queries.size(1), "gradient");
  check_size(gradient, 2, classes, "gradient");
  check_dims(weights, 2, "weights");
  check_size(weights, 0, tasks, "weights");
  check_size(weights, 1, classes, "weights");
  check_dims(labels, 2, "labels");
  std::optional<Tensor> factor;
  if (scale) {
    check_floating(*scale, "scale");
    check_same_type(*scale, means, "scale");
    check_dims(*scale, 1, "scale");
    check_size(*scale, 0, tasks, "scale");
    factor = torch::stable::contiguous(*scale);
  }
  return {torch::stable::contiguous(gradient),
          factor,
          shaped_labels(labels, means, tasks, labels.size(1)),
          torch::stable::contiguous(queries),
          torch::stable::contiguous(means),
          torch::stable::contiguous(weights),
          tasks,
          labels.size(1),
          queries.size(1),
          classes,
          means.size(2)};
}

}  // namespace innerloop
