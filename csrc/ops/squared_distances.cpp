// squared_distances: squared Euclidean distances between the queries and the points of each task, and their gradient.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <tuple>

#include "kernels/distance.h"
#include "ops/checks.h"

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

// Calls work(task, first, last) for blocks of the rows of every task, in parallel: one large task is shared by the
// threads too.
template <class Work>
void for_row_blocks(int64_t tasks, int64_t rows, int64_t operations_a_row, const Work& work) {
  constexpr int64_t block = 16;  // rows; a multiple of the kernels' tiles
  const int64_t blocks = (rows + block - 1) / block;
  torch::stable::parallel_for(0, tasks * blocks, grain(block * operations_a_row), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i % blocks * block;
      work(i / blocks, first, std::min(first + block, rows));
    }
  });
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
    for_row_blocks(n.tasks, n.queries, n.points * n.dim, [&](int64_t t, int64_t first, int64_t last) {
      const int64_t row = t * n.queries + first;
      INNERLOOP_CALL(squared_distances, a + row * n.dim, b + t * n.points * n.dim, last - first, n.points, n.dim,
                     d + row * n.points);
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
  for_type(q, [&]<class T>(T) {
    const T* upstream = g.const_data_ptr<T>();
    const T* a = q.const_data_ptr<T>();
    const T* b = p.const_data_ptr<T>();
    T* to_queries = grad_queries.mutable_data_ptr<T>();
    T* to_points = grad_points.mutable_data_ptr<T>();
    for_row_blocks(n.tasks, n.queries, n.points * n.dim, [&](int64_t t, int64_t first, int64_t last) {
      const int64_t row = t * n.queries + first;
      INNERLOOP_CALL(squared_distances_backward, upstream + row * n.points, n.points, int64_t{1}, a + row * n.dim,
                     b + t * n.points * n.dim, last - first, n.points, n.dim, to_queries + row * n.dim);
    });
    for_row_blocks(n.tasks, n.points, n.queries * n.dim, [&](int64_t t, int64_t first, int64_t last) {
      const int64_t row = t * n.points + first;
      INNERLOOP_CALL(squared_distances_backward, upstream + t * n.queries * n.points + first, int64_t{1}, n.points,
                     b + row * n.dim, a + t * n.queries * n.dim, last - first, n.queries, n.dim,
                     to_points + row * n.dim);
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
