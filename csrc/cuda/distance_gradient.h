// The gradients of squared distances ‖a[i] − b[j]‖² for a and b.
#pragma once

#include "cuda/launch.h"

namespace innerloop {

// out[i] = 2 · scale · factors[t] Σⱼ w(i,j) (own[i] − other[j]) for own [tasks, rows, dim] and other [tasks, count,
// dim]: a thread for each element, which adds up over j. w(i,j) is gradient[t][i·own_step + j·other_step], and factors
// null counts as ones.
template <class T>
__global__ void distance_gradient_kernel(const T* gradient, int64_t own_step, int64_t other_step, const T* factors,
                                         T scale, const T* own, const T* other, int64_t tasks, int64_t rows,
                                         int64_t count, int64_t dim, T* out) {
  const int64_t items = tasks * rows * dim, step = int64_t{blockDim.x} * gridDim.x;
  for (int64_t item = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; item < items; item += step) {
    const int64_t d = item % dim, i = item / dim % rows, t = item / (dim * rows);
    const T* weight = gradient + t * rows * count + i * own_step;
    const T* column = other + t * count * dim + d;
    const T here = own[item];
    T sum = 0;
    for (int64_t j = 0; j < count; ++j) sum += weight[j * other_step] * (here - column[j * dim]);
    out[item] = 2 * scale * (factors == nullptr ? T(1) : factors[t]) * sum;
  }
}

// For a [tasks, rows, dim] and b [tasks, count, dim], given gradient [tasks, rows, count].
template <class T>
void distance_gradient(const Device& device, const T* gradient, const T* factors, T scale, const T* a, const T* b,
                       int64_t tasks, int64_t rows, int64_t count, int64_t dim, T* to_a, T* to_b) {
  device.launch(distance_gradient_kernel<T>, grid_for(tasks * rows * dim), threads_a_block, 0, gradient, count,
                int64_t{1}, factors, scale, a, b, tasks, rows, count, dim, to_a);
  device.launch(distance_gradient_kernel<T>, grid_for(tasks * count * dim), threads_a_block, 0, gradient, int64_t{1},
                count, factors, scale, b, a, tasks, count, rows, dim, to_b);
}

}  // namespace innerloop
