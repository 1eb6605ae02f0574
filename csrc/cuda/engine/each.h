// The two shapes that nearly all kernels of the engine have: a function of each of count indices, and sums over the
// rows of a matrix of every task.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cuda/launch.h"

namespace innerloop::gpu {

template <class Function>
__global__ void each_kernel(const Function function, const int64_t count) {
  const int64_t step = int64_t{blockDim.x} * gridDim.x;
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < count; i += step) function(i);
}

// Calls function(i) on the device for i = 0 … count-1.
template <class Function>
void each(const Device& device, int64_t count, const Function& function) {
  device.launch(each_kernel<Function>, grid_for(count), threads_a_block, 0, function, count);
}

template <class T>
struct Zero {
  T* to;
  __device__ void operator()(int64_t i) const { to[i] = 0; }
};

template <class T>
struct Add {  // to += from
  const T* from;
  T* to;
  __device__ void operator()(int64_t i) const { to[i] += from[i]; }
};

// --- sums over rows -------------------------------------------------------------------------------

template <class T>
struct Pair {
  T first = 0, second = 0;
};

constexpr int columns_a_block = 32, rows_at_once = 8;
constexpr int64_t rows_a_slice = 2048;

inline int64_t slices_of(int64_t rows) {
  return (rows + rows_a_slice - 1) / rows_a_slice;
}

// Numbers of type double that sum_rows needs for one task.
inline int64_t sums_size(int64_t rows, int64_t columns) {
  return 2 * slices_of(rows) * columns;
}

// A block sums 32 columns of one slice of one task's rows: every thread each eighth row, then the eight of a column in
// a tree. partial is [tasks][slices][columns].
template <class Terms>
__global__ void sum_slices_kernel(const Terms terms, const int64_t rows, const int64_t columns, const int64_t slices,
                                  Pair<double>* partial) {
  __shared__ double first[rows_at_once][columns_a_block], second[rows_at_once][columns_a_block];
  const int64_t column_blocks = (columns + columns_a_block - 1) / columns_a_block;
  const int64_t column = int64_t{blockIdx.x} % column_blocks * columns_a_block + threadIdx.x;
  const int64_t slice = int64_t{blockIdx.x} / column_blocks % slices;
  const int64_t task = int64_t{blockIdx.x} / column_blocks / slices;
  const int64_t end = (slice + 1) * rows_a_slice < rows ? (slice + 1) * rows_a_slice : rows;
  Pair<double> sum;
  if (column < columns) {
    for (int64_t row = slice * rows_a_slice + threadIdx.y; row < end; row += rows_at_once) {
      const auto term = terms(task, row, column);
      sum.first += static_cast<double>(term.first);
      sum.second += static_cast<double>(term.second);
    }
  }
  first[threadIdx.y][threadIdx.x] = sum.first;
  second[threadIdx.y][threadIdx.x] = sum.second;
  __syncthreads();
  for (unsigned half = rows_at_once / 2; half > 0; half /= 2) {
    if (threadIdx.y < half) {
      first[threadIdx.y][threadIdx.x] += first[threadIdx.y + half][threadIdx.x];
      second[threadIdx.y][threadIdx.x] += second[threadIdx.y + half][threadIdx.x];
    }
    __syncthreads();
  }
  if (threadIdx.y == 0 && column < columns) {
    partial[(task * slices + slice) * columns + column] = {first[0][threadIdx.x], second[0][threadIdx.x]};
  }
}

// Adds up the slices of a column, in order, and hands the sums on.
template <class Finish>
struct FinishSums {
  Finish finish;
  int64_t columns, slices;
  const Pair<double>* partial;

  __device__ void operator()(int64_t i) const {
    const int64_t task = i / columns, column = i % columns;
    Pair<double> sum;
    for (int64_t slice = 0; slice < slices; ++slice) {
      const Pair<double> part = partial[(task * slices + slice) * columns + column];
      sum.first += part.first;
      sum.second += part.second;
    }
    finish(task, column, sum);
  }
};

// Calls finish(task, column, sums) on the device with the sums over all rows of the Pair terms(task, row, column). In
// double, in an order that depends on the sizes alone.
template <class Terms, class Finish>
void sum_rows(const Device& device, int64_t tasks, int64_t rows, int64_t columns, double* scratch, const Terms& terms,
              const Finish& finish) {
  const int64_t slices = slices_of(rows), column_blocks = (columns + columns_a_block - 1) / columns_a_block;
  auto* partial = reinterpret_cast<Pair<double>*>(scratch);
  device.launch(sum_slices_kernel<Terms>, static_cast<unsigned>(tasks * slices * column_blocks),
                dim3(columns_a_block, rows_at_once), 0, terms, rows, columns, slices, partial);
  each(device, tasks * columns, FinishSums<Finish>{finish, columns, slices, partial});
}

}  // namespace innerloop::gpu
