// The arguments of squared_distances and of its backward.
#pragma once

#include "ops/checks.h"

namespace innerloop {

struct SquaredDistances {
  Tensor queries, points;
  int64_t tasks, rows, count, dim;  // T, Q, N, D
};

inline SquaredDistances checked_squared_distances(const Tensor& queries, const Tensor& points) {
  check_floating(queries, "queries");
  check_floating(points, "points");
  check_same_type(points, queries, "points");
  check_dims(queries, 3, "queries");
  check_dims(points, 3, "points");
  check_size(points, 0, queries.size(0), "points");
  check_size(points, 2, queries.size(2), "points");
  return {torch::stable::contiguous(queries),
          torch::stable::contiguous(points),
          queries.size(0),
          queries.size(1),
          points.size(1),
          queries.size(2)};
}

// The gradient of distances [T, Q, N], contiguous.
inline Tensor checked_distance_gradient(const Tensor& gradient, const SquaredDistances& of) {
  check_floating(gradient, "gradient");
  check_same_type(gradient, of.queries, "gradient");
  check_dims(gradient, 3, "gradient");
  check_size(gradient, 0, of.tasks, "gradient");
  check_size(gradient, 1, of.rows, "gradient");
  check_size(gradient, 2, of.count, "gradient");
  return torch::stable::contiguous(gradient);
}

}  // namespace innerloop
