// inner_products, gram_matrix and combine_rows on CUDA.
#include "cuda/pair_sums.h"
#include "ops/row_products.h"

namespace innerloop {
namespace {

Tensor inner_products_cuda(Tensor a, Tensor b, bool float64) {
  const InnerProducts n = checked_inner_products(a, b);
  const Device device(n.a, "inner_products");
  const ScalarType type = float64 ? ScalarType::Double : n.a.scalar_type();
  Tensor out = torch::stable::new_empty(n.a, {n.tasks, n.a_rows, n.b_rows}, type);
  for_sum_type(float64, n.a, [&]<class A, class T>(A, T) {
    const Rows<T> left{n.a.const_data_ptr<T>(), n.a_rows, n.dim, n.a_rows * n.dim};
    const Rows<T> right{n.b.const_data_ptr<T>(), n.b_rows, n.dim, n.b_rows * n.dim};
    pair_sums<Product>(device, left, right, n.tasks, n.dim, A(1), out.mutable_data_ptr<A>());
  });
  return out;
}

Tensor gram_matrix_cuda(Tensor rows) {
  const Tensor x = checked_rows(rows);
  const int64_t tasks = x.size(0), count = x.size(1), dim = x.size(2);
  const Device device(x, "gram_matrix");
  Tensor out = torch::stable::new_empty(x, {tasks, count, count}, ScalarType::Double);
  for_type(x, [&]<class T>(T) {
    const Rows<T> both{x.const_data_ptr<T>(), count, dim, count * dim};
    pair_sums<Product>(device, both, both, tasks, dim, 1.0, out.mutable_data_ptr<double>());
  });
  return out;
}

// A thread for each element of out [tasks, out_rows, dim] = coefficients [tasks, out_rows, in_rows] times rows
// [tasks, in_rows, dim], summed up in A.
template <class A, class T>
__global__ void combine_rows_kernel(const A* coefficients, const T* rows, int64_t tasks, int64_t out_rows,
                                    int64_t in_rows, int64_t dim, T* out) {
  const int64_t items = tasks * out_rows * dim, step = int64_t{blockDim.x} * gridDim.x;
  for (int64_t item = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; item < items; item += step) {
    const int64_t d = item % dim, row = item / dim;
    const A* coefficient = coefficients + row * in_rows;
    const T* column = rows + row / out_rows * in_rows * dim + d;
    A sum = 0;
    for (int64_t j = 0; j < in_rows; ++j) sum += coefficient[j] * static_cast<A>(column[j * dim]);
    out[item] = static_cast<T>(sum);
  }
}

Tensor combine_rows_cuda(Tensor coefficients, Tensor rows) {
  const CombineRows n = checked_combine_rows(coefficients, rows);
  const Device device(n.rows, "combine_rows");
  Tensor out = torch::stable::new_empty(n.rows, {n.tasks, n.out_rows, n.dim});
  for_sum_type(n.float64, n.rows, [&]<class A, class T>(A, T) {
    device.launch(combine_rows_kernel<A, T>, grid_for(n.tasks * n.out_rows * n.dim), threads_a_block, 0,
                  n.coefficients.const_data_ptr<A>(), n.rows.const_data_ptr<T>(), n.tasks, n.out_rows, n.in_rows, n.dim,
                  out.mutable_data_ptr<T>());
  });
  return out;
}

}  // namespace
}  // namespace innerloop

INNERLOOP_CUDA_OPS(m) {
  m.impl("inner_products", TORCH_BOX(&innerloop::inner_products_cuda));
  m.impl("gram_matrix", TORCH_BOX(&innerloop::gram_matrix_cuda));
  m.impl("combine_rows", TORCH_BOX(&innerloop::combine_rows_cuda));
}
