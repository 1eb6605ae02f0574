// The arguments of inner_products, gram_matrix and combine_rows.
#pragma once

#include "ops/checks.h"

namespace innerloop {

struct InnerProducts {
  Tensor a, b;
  int64_t tasks, a_rows, b_rows, dim;
};

inline InnerProducts checked_inner_products(const Tensor& a, const Tensor& b) {
  check_floating(a, "a");
  check_floating(b, "b");
  check_same_type(b, a, "b");
  check_dims(a, 3, "a");
  check_dims(b, 3, "b");
  check_size(b, 0, a.size(0), "b");
  check_size(b, 2, a.size(2), "b");
  return {torch::stable::contiguous(a), torch::stable::contiguous(b), a.size(0), a.size(1), b.size(1), a.size(2)};
}

// Of a Gram matrix, contiguous.
inline Tensor checked_rows(const Tensor& rows) {
  check_floating(rows, "rows");
  check_dims(rows, 3, "rows");
  return torch::stable::contiguous(rows);
}

struct CombineRows {
  Tensor coefficients, rows;
  bool float64;  // the coefficients
  int64_t tasks, out_rows, in_rows, dim;
};

inline CombineRows checked_combine_rows(const Tensor& coefficients, const Tensor& rows) {
  check_floating(rows, "rows");
  check_floating(coefficients, "coefficients");
  check_same_device(coefficients, rows, "coefficients");
  const bool float64 = coefficients.scalar_type() == ScalarType::Double;
  STD_TORCH_CHECK(float64 || coefficients.scalar_type() == rows.scalar_type(),
                  "coefficients must be float64 or have the dtype of rows");
  check_dims(rows, 3, "rows");
  check_dims(coefficients, 3, "coefficients");
  check_size(coefficients, 0, rows.size(0), "coefficients");
  check_size(coefficients, 2, rows.size(1), "coefficients");
  return {torch::stable::contiguous(coefficients),
          torch::stable::contiguous(rows),
          float64,
          rows.size(0),
          coefficients.size(1),
          rows.size(1),
          rows.size(2)};
}

// Calls work(A{}, T{}) with the types of sums and of rows.
template <class Work>
void for_sum_type(bool double_sums, const Tensor& rows, const Work& work) {
  for_type(rows, [&]<class T>(T row) {
    if (double_sums) {
      work(double{}, row);
    } else {
      work(row, row);
    }
  });
}

}  // namespace innerloop
