// The arguments of prototypes and of its backward.
#pragma once

#include "ops/checks.h"

namespace innerloop {

struct Prototypes {
  Tensor embeddings, labels;
  int64_t tasks, samples, classes, dim;
};

inline Prototypes checked_prototypes(const Tensor& embeddings, const Tensor& labels, int64_t num_classes) {
  check_floating(embeddings, "embeddings");
  check_dims(embeddings, 3, "embeddings");
  STD_TORCH_CHECK(num_classes >= 0, "num_classes must be at least 0");
  const int64_t tasks = embeddings.size(0), samples = embeddings.size(1);
  return {torch::stable::contiguous(embeddings),
          shaped_labels(labels, embeddings, tasks, samples),
          tasks,
          samples,
          num_classes,
          embeddings.size(2)};
}

struct PrototypesBackward {
  Tensor gradient, weights, labels;
  int64_t tasks, samples, classes, dim;
};

inline PrototypesBackward checked_prototypes_backward(const Tensor& gradient, const Tensor& weights,
                                                      const Tensor& labels) {
  check_floating(gradient, "gradient");
  check_dims(gradient, 3, "gradient");
  check_floating(weights, "weights");
  check_same_type(weights, gradient, "weights");
  check_dims(weights, 2, "weights");
  check_dims(labels, 2, "labels");
  const int64_t tasks = gradient.size(0), classes = gradient.size(1), samples = labels.size(1);
  check_size(weights, 0, tasks, "weights");
  check_size(weights, 1, classes, "weights");
  return {torch::stable::contiguous(gradient),
          torch::stable::contiguous(weights),
          shaped_labels(labels, gradient, tasks, samples),
          tasks,
          samples,
          classes,
          gradient.size(2)};
}

}  // namespace innerloop
