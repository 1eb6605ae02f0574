// squared_distances: squared Euclidean distances between the queries and the points of each task, and their gradient.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "kernels/distance.h"
#include "ops/checks.h"
#include "ops/large_output.h"
#include "ops/parallel.h"

namespace innerloop {
namespace {

struct Sizes {
  int64_t tasks, queries, points, dim;
};

Sizes checked_sizes(const Tensor& queries, const Tensor& points) {
  check_floating(queries, "queries");
  check_floating(points, "points");
  check_same_type(points, queries, "points");
  check_dims(queries, 3, "queries");
  check_dims(points, 3, "points");
  check_size(points, 0, queries.size(0), "points");
  check_size(points, 2, queries.size(2), "points");
  return {queries.size(0), queries.size(1), points.size(1), queries.size(2)};
}

Tensor squared_distances_cpu(Tensor queries, Tensor points) {
  const Sizes n = checked_sizes(queries, points);
  const Tensor q = torch::stable::contiguous(queries);
  const Tensor p = torch::stable::contiguous(points);
  Tensor out = torch::stable::new_empty(q, {n.tasks, n.queries, n.points});
  for_type(q, [&]<class T>(T) {
    const T* a = q.const_data_ptr<T>();
    const T* b = p.const_data_ptr<T>();
    T* d = out.mutable_data_ptr<T>();
    const int64_t size = INNERLOOP_CALL(packed_points_size, b, n.points, n.dim);
    Tensor packed = torch::stable::new_empty(q, {n.tasks, size});
    T* to = packed.mutable_data_ptr<T>();
    torch::stable::parallel_for(0, n.tasks, grain(size), [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) {
        INNERLOOP_CALL(pack_points, b + t * n.points * n.dim, n.points, n.dim, to + t * size);
      }
    });
    for_blocks(n.tasks, n.queries, rows_a_block, n.points * n.dim, [&](int64_t t, int64_t first, int64_t last) {
      const int64_t row = t * n.queries + first;
      INNERLOOP_CALL(squared_distances, a + row * n.dim, b + t * n.points * n.dim, to + t * size, last - first,
                     n.points, n.dim, T(1), d + row * n.points);
    });
  });
  return out;
}

std::tuple<Tensor, Tensor> squared_distances_backward_cpu(Tensor gradient, Tensor queries, Tensor points) {
  const Sizes n = checked_sizes(queries, points);
  check_floating(gradient, "gradient");
  check_same_type(gradient, queries, "gradient");
  check_dims(gradient, 3, "gradient");
  check_size(gradient, 0, n.tasks, "gradient");
  check_size(gradient, 1, n.queries, "gradient");
  check_size(gradient, 2, n.points, "gradient");
  const Tensor g = torch::stable::contiguous(gradient);
  const Tensor q = torch::stable::contiguous(queries);
  const Tensor p = torch::stable::contiguous(points);
  Tensor grad_queries = torch::stable::empty_like(q);
  Tensor grad_points = torch::stable::empty_like(p);
  want_huge_pages(grad_queries);
  const bool nontemporal = exceeds_caches(grad_queries);
  for_type(q, [&]<class T>(T) {
    const T* upstream = g.const_data_ptr<T>();
    const T* a = q.const_data_ptr<T>();
    const T* b = p.const_data_ptr<T>();
    T* to_queries = grad_queries.mutable_data_ptr<T>();
    T* to_points = grad_points.mutable_data_ptr<T>();
    for_blocks(n.tasks, n.dim, columns_a_block, 2 * n.queries * n.points, [&](int64_t t, int64_t first, int64_t last) {
      const int64_t row = t * n.queries, point = t * n.points;
      INNERLOOP_CALL(squared_distances_backward, upstream + row * n.points, T(1), a + row * n.dim, b + point * n.dim,
                     n.queries, n.points, n.dim, first, last, nontemporal, to_queries + row * n.dim,
                     to_points + point * n.dim);
    });
  });
  return {grad_queries, grad_points};
}

}  // namespace
}  // namespace innerloop

STABLE_TORCH_LIBRARY_FRAGMENT(innerloop, m) {
  m.def("squared_distances(Tensor queries, Tensor points) -> Tensor");
  m.def("squared_distances_backward(Tensor gradient, Tensor queries, Tensor points) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(innerloop, CPU, m) {
  m.impl("squared_distances", TORCH_BOX(&innerloop::squared_distances_cpu));
  m.impl("squared_distances_backward", TORCH_BOX(&innerloop::squared_distances_backward_cpu));
}
