// The arguments of class_logsumexp.
#pragma once

#include "ops/checks.h"

namespace innerloop {

struct ClassLogsumexp {
  Tensor scores, labels;
  int64_t tasks, queries, samples, classes;
};

inline ClassLogsumexp checked_class_logsumexp(const Tensor& scores, const Tensor& labels, int64_t num_classes) {
  check_floating(scores, "scores");
  check_dims(scores, 3, "scores");
  STD_TORCH_CHECK(num_classes >= 0, "num_classes must be at least 0");
  const int64_t tasks = scores.size(0), queries = scores.size(1), samples = scores.size(2);
  return {torch::stable::contiguous(scores),
          shaped_labels(labels, scores, tasks, samples),
          tasks,
          queries,
          samples,
          num_classes};
}

}  // namespace innerloop
