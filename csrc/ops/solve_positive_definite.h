// The arguments of solve_positive_definite, and the error of a matrix that is not positive definite.
#pragma once

#include "ops/checks.h"

namespace innerloop {

struct Systems {
  Tensor matrix, right;          // float64
  int64_t tasks, size, columns;  // T, M, N
};

inline Systems checked_systems(const Tensor& matrix, const Tensor& right) {
  check_floating(matrix, "matrix");
  check_floating(right, "right");
  STD_TORCH_CHECK(matrix.scalar_type() == ScalarType::Double, "matrix must be float64");
  check_same_type(right, matrix, "right");
  check_dims(matrix, 3, "matrix");
  check_dims(right, 3, "right");
  const int64_t tasks = matrix.size(0), size = matrix.size(1);
  check_size(matrix, 2, size, "matrix");
  check_size(right, 0, tasks, "right");
  check_size(right, 1, size, "right");
  return {torch::stable::contiguous(matrix), torch::stable::contiguous(right), tasks, size, right.size(2)};
}

// reached: for each task the row at which its factorisation stopped, size if it went through.
inline void check_reached(const int64_t* reached, int64_t tasks, int64_t size) {
  for (int64_t t = 0; t < tasks; ++t) {
    STD_TORCH_CHECK(reached[t] == size, "the ", size, " × ", size, " matrix of task ", t,
                    " is not positive definite in float64 (row ", reached[t],
                    "): its embeddings are not finite, or regularization is too small beside their inner products. "
                    "Raise regularization, or scale the embeddings");
  }
}

}  // namespace innerloop
