// inner_products, gram_matrix and combine_rows: products with the embeddings of each task.
#include "kernels/row_products.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>

#include "ops/large_output.h"
#include "ops/parallel.h"
#include "ops/row_products.h"

namespace innerloop {
namespace {

constexpr int64_t row_block = 30;  // rows a thread takes at a time; a multiple of the kernels' tiles

// [T, A, B] of rows a [T, A, D] and b [T, B, D], in their type or in float64.
Tensor inner_products_cpu(Tensor a, Tensor b, bool float64) {
  const auto [left, right, tasks, a_rows, b_rows, dim] = checked_inner_products(a, b);
  Tensor out =
      torch::stable::new_empty(left, {tasks, a_rows, b_rows}, float64 ? ScalarType::Double : left.scalar_type());
  const int64_t blocks = (a_rows + row_block - 1) / row_block;
  for_sum_type(float64, left, [&]<class A, class T>(A, T) {
    A* to = out.mutable_data_ptr<A>();
    const T* x = left.const_data_ptr<T>();
    const T* y = right.const_data_ptr<T>();
    torch::stable::parallel_for(
        0, tasks * blocks, grain(product(row_block, b_rows, dim)), [&](int64_t begin, int64_t end) {
          for (int64_t i = begin; i < end; ++i) {
            const int64_t t = i / blocks, first = i % blocks * row_block, row = t * a_rows + first;
            INNERLOOP_CALL(inner_products, x + row * dim, y + t * b_rows * dim, std::min(row_block, a_rows - first),
                           b_rows, dim, false, to + row * b_rows, b_rows);
          }
        });
  });
  return out;
}

// [T, S, S] float64: the inner products of the rows [T, S, D] with one another, exactly symmetric.
Tensor gram_matrix_cpu(Tensor rows) {
  const Tensor x = checked_rows(rows);
  const int64_t tasks = x.size(0), count = x.size(1), dim = x.size(2);
  Tensor out = torch::stable::new_empty(x, {tasks, count, count}, ScalarType::Double);
  double* to = out.mutable_data_ptr<double>();
  const int64_t blocks = (count + row_block - 1) / row_block;
  for_type(x, [&]<class T>(T) {
    const T* from = x.const_data_ptr<T>();
    torch::stable::parallel_for(
        0, tasks * blocks, grain(product(row_block, count, dim) / 2), [&](int64_t begin, int64_t end) {
          for (int64_t i = begin; i < end; ++i) {
            const int64_t t = i / blocks, first = i % blocks * row_block, last = std::min(first + row_block, count);
            const T* task = from + t * count * dim;
            double* matrix = to + t * count * count;
            INNERLOOP_CALL(inner_products, task + first * dim, task, last - first, last, dim, true,
                           matrix + first * count, count);
          }
        });
  });
  for (int64_t t = 0; t < tasks; ++t) {
    double* matrix = to + t * count * count;
    for (int64_t i = 0; i < count; ++i) {
      for (int64_t j = 0; j < i; ++j) matrix[j * count + i] = matrix[i * count + j];
    }
  }
  return out;
}

// [T, A, D]: coefficients [T, A, B], float64 or of the type of the rows, times rows [T, B, D].
Tensor combine_rows_cpu(Tensor coefficients, Tensor rows) {
  const auto [c, x, float64, tasks, out_rows, in_rows, dim] = checked_combine_rows(coefficients, rows);
  Tensor out = torch::stable::new_empty(x, {tasks, out_rows, dim});
  want_huge_pages(out);
  const bool nontemporal = exceeds_caches(out);
  constexpr int64_t block = 3072;  // columns; a multiple of the kernels' tiles
  const int64_t blocks = (dim + block - 1) / block;
  for_sum_type(float64, x, [&]<class A, class T>(A, T) {
    const A* coefficient = c.const_data_ptr<A>();
    const T* from = x.const_data_ptr<T>();
    T* to = out.mutable_data_ptr<T>();
    torch::stable::parallel_for(
        0, tasks * blocks, grain(product(block, in_rows, out_rows)), [&](int64_t begin, int64_t end) {
          for (int64_t i = begin; i < end; ++i) {
            const int64_t t = i / blocks, first = i % blocks * block;
            INNERLOOP_CALL(combine_rows, coefficient + t * out_rows * in_rows, from + t * in_rows * dim + first,
                           out_rows, in_rows, std::min(block, dim - first), dim, nontemporal,
                           to + t * out_rows * dim + first);
          }
        });
  });
  return out;
}

}  // namespace
}  // namespace innerloop

STABLE_TORCH_LIBRARY_FRAGMENT(innerloop, m) {
  m.def("inner_products(Tensor a, Tensor b, bool float64) -> Tensor");
  m.def("gram_matrix(Tensor rows) -> Tensor");
  m.def("combine_rows(Tensor coefficients, Tensor rows) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(innerloop, CPU, m) {
  m.impl("inner_products", TORCH_BOX(&innerloop::inner_products_cpu));
  m.impl("gram_matrix", TORCH_BOX(&innerloop::gram_matrix_cpu));
  m.impl("combine_rows", TORCH_BOX(&innerloop::combine_rows_cpu));
}
