// Products of matrices, one for each task, by torch's batched product: on a GPU that is cuBLAS.
#pragma once

#include <cstdint>

#include "cuda/launch.h"

namespace innerloop::gpu {

// [tasks][rows][columns], dense; transposed: stands for the transposes of what is there.
template <class T>
struct Matrices {
  const T* data;
  int64_t rows, columns;
  bool transposed = false;

  Matrices transpose() const { return {data, rows, columns, !transposed}; }
};

// out = a b, dense.
template <class T>
void multiply(const Device& device, int64_t tasks, const Matrices<T>& a, const Matrices<T>& b, T* out);

// out += a b. scratch is of out's size. (baddbmm would add by itself, but the stable ABI cannot pass its scalars.)
template <class T>
void multiply_add(const Device& device, int64_t tasks, const Matrices<T>& a, const Matrices<T>& b, T* out, T* scratch);

}  // namespace innerloop::gpu
