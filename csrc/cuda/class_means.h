// The mean embedding of each class of each task, and its transpose. A label outside 0 … classes - 1 is of no class:
// values are not looked at before a launch, which would have to wait for the device.
#pragma once

#include "cuda/launch.h"

namespace innerloop {

// A thread for each element of means [tasks, classes, dim], which adds the samples of its class up in their order; that
// of the first column writes 1 / their number into weights [tasks, classes], 0 for a class without a sample.
template <class T>
__global__ void class_means_kernel(const T* embeddings, const int64_t* labels, int64_t tasks, int64_t samples,
                                   int64_t classes, int64_t dim, T* means, T* weights) {
  const int64_t columns = max(dim, int64_t{1});  // a class has a weight even where its mean has no element
  const int64_t items = tasks * classes * columns, step = int64_t{blockDim.x} * gridDim.x;
  for (int64_t item = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; item < items; item += step) {
    const int64_t d = item % columns, row = item / columns, t = row / classes, c = row % classes;
    T sum = 0, count = 0;
    for (int64_t s = t * samples; s < (t + 1) * samples; ++s) {
      if (labels[s] != c) continue;
      count += 1;
      if (d < dim) sum += embeddings[s * dim + d];
    }
    const T weight = count == 0 ? T(0) : 1 / count;
    if (d < dim) means[row * dim + d] = sum * weight;
    if (d == 0) weights[row] = weight;
  }
}

template <class T>
void class_means(const Device& device, const T* embeddings, const int64_t* labels, int64_t tasks, int64_t samples,
                 int64_t classes, int64_t dim, T* means, T* weights) {
  device.launch(class_means_kernel<T>, grid_for(tasks * classes * std::max(dim, int64_t{1})), threads_a_block, 0,
                embeddings, labels, tasks, samples, classes, dim, means, weights);
}

// out [tasks, samples, dim]: each sample the gradient of its class's mean times its weight.
template <class T>
__global__ void class_means_backward_kernel(const T* gradient, const T* weights, const int64_t* labels, int64_t tasks,
                                            int64_t samples, int64_t classes, int64_t dim, T* out) {
  const int64_t items = tasks * samples * dim, step = int64_t{blockDim.x} * gridDim.x;
  for (int64_t item = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; item < items; item += step) {
    const int64_t d = item % dim, sample = item / dim, c = labels[sample];
    const int64_t row = sample / samples * classes + c;
    out[item] = c >= 0 && c < classes ? weights[row] * gradient[row * dim + d] : T(0);
  }
}

template <class T>
void class_means_backward(const Device& device, const T* gradient, const T* weights, const int64_t* labels,
                          int64_t tasks, int64_t samples, int64_t classes, int64_t dim, T* out) {
  device.launch(class_means_backward_kernel<T>, grid_for(tasks * samples * dim), threads_a_block, 0, gradient, weights,
                labels, tasks, samples, classes, dim, out);
}

}  // namespace innerloop
