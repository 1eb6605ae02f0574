// squared_distances on CUDA, and its gradient. Distances are summed from differences: identical points are at 0
// exactly, and none is negative.
#include <tuple>

#include "cuda/distance_gradient.h"
#include "cuda/pair_sums.h"
#include "ops/squared_distances.h"

namespace innerloop {
namespace {

Tensor squared_distances_cuda(Tensor queries, Tensor points) {
  const SquaredDistances n = checked_squared_distances(queries, points);
  const Device device(n.queries, "squared_distances");
  Tensor out = torch::stable::new_empty(n.queries, {n.tasks, n.rows, n.count});
  for_type(n.queries, [&]<class T>(T) {
    const Rows<T> a{n.queries.const_data_ptr<T>(), n.rows, n.dim, n.rows * n.dim};
    const Rows<T> b{n.points.const_data_ptr<T>(), n.count, n.dim, n.count * n.dim};
    pair_sums<SquaredDifference>(device, a, b, n.tasks, n.dim, T(1), out.mutable_data_ptr<T>());
  });
  return out;
}

std::tuple<Tensor, Tensor> squared_distances_backward_cuda(Tensor gradient, Tensor queries, Tensor points) {
  const SquaredDistances n = checked_squared_distances(queries, points);
  const Tensor g = checked_distance_gradient(gradient, n);
  const Device device(n.queries, "squared_distances_backward");
  Tensor grad_queries = torch::stable::empty_like(n.queries);
  Tensor grad_points = torch::stable::empty_like(n.points);
  for_type(n.queries, [&]<class T>(T) {
    const T* no_factors = nullptr;
    distance_gradient(device, g.const_data_ptr<T>(), no_factors, T(1), n.queries.const_data_ptr<T>(),
                      n.points.const_data_ptr<T>(), n.tasks, n.rows, n.count, n.dim, grad_queries.mutable_data_ptr<T>(),
                      grad_points.mutable_data_ptr<T>());
  });
  return {grad_queries, grad_points};
}

}  // namespace
}  // namespace innerloop

INNERLOOP_CUDA_OPS(m) {
  m.impl("squared_distances", TORCH_BOX(&innerloop::squared_distances_cuda));
  m.impl("squared_distances_backward", TORCH_BOX(&innerloop::squared_distances_backward_cuda));
}
