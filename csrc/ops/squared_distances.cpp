// squared_distances: squared Euclidean distances between the queries and the points of each task, and their gradient.
#include "ops/squared_distances.h"

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "kernels/distance.h"
#include "ops/large_output.h"
#include "ops/parallel.h"

namespace innerloop {
namespace {

Tensor squared_distances_cpu(Tensor queries, Tensor points) {
  const SquaredDistances n = checked_squared_distances(queries, points);
  const Tensor &q = n.queries, &p = n.points;
  Tensor out = torch::stable::new_empty(q, {n.tasks, n.rows, n.count});
  for_type(q, [&]<class T>(T) {
    const T* a = q.const_data_ptr<T>();
    const T* b = p.const_data_ptr<T>();
    T* d = out.mutable_data_ptr<T>();
    for_blocks(n.tasks, n.rows, rows_a_block, product(n.count, n.dim), [&](int64_t t, int64_t first, int64_t last) {
      const int64_t row = t * n.rows + first;
      INNERLOOP_CALL(squared_distances, a + row * n.dim, b + t * n.count * n.dim, last - first, n.count, n.dim, T(1),
                     d + row * n.count);
    });
  });
  return out;
}

std::tuple<Tensor, Tensor> squared_distances_backward_cpu(Tensor gradient, Tensor queries, Tensor points) {
  const SquaredDistances n = checked_squared_distances(queries, points);
  const Tensor g = checked_distance_gradient(gradient, n);
  const Tensor &q = n.queries, &p = n.points;
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
    for_blocks(n.tasks, n.dim, columns_a_block, product(2, n.rows, n.count),
               [&](int64_t t, int64_t first, int64_t last) {
                 const int64_t row = t * n.rows, point = t * n.count;
                 INNERLOOP_CALL(squared_distances_backward, upstream + row * n.count, T(1), a + row * n.dim,
                                b + point * n.dim, n.rows, n.count, n.dim, first, last, nontemporal,
                                to_queries + row * n.dim, to_points + point * n.dim);
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
