// Sums over two rows, for all pairs of rows of two matrices: inner products and squared distances.
#pragma once

#include "cuda/launch.h"

namespace innerloop {

// Rows of each of a batch of matrices.
template <class T>
struct Rows {
  const T* data;
  int64_t count;
  int64_t row;    // elements from one to the next
  int64_t batch;  // elements from one matrix to the next
};

struct Product {
  template <class A>
  static __device__ A of(A a, A b) {
    return a * b;
  }
};

struct SquaredDifference {
  template <class A>
  static __device__ A of(A a, A b) {
    return (a - b) * (a - b);
  }
};

constexpr int pair_tile = 16;             // a block's rows of either side, each of its threads with a pair
constexpr int pair_depth = 32;            // columns that shared memory holds of them
constexpr int pair_row = pair_depth + 1;  // one more, so that the rows begin in different banks of shared memory

// The columns d … d + pair_depth - 1 of the rows from `first` on; zeros beyond either end.
template <class A, class T>
__device__ void load_tile(const Rows<T>& rows, int64_t batch, int64_t first, int64_t d, int64_t inner, A* tile) {
  for (int e = threadIdx.x; e < pair_tile * pair_depth; e += blockDim.x) {
    const int64_t i = first + e / pair_depth, column = d + e % pair_depth;
    const bool there = i < rows.count && column < inner;
    tile[e / pair_depth * pair_row + e % pair_depth] =
        there ? static_cast<A>(rows.data[batch * rows.batch + i * rows.row + column]) : A(0);
  }
}

// out [batches, a.count, b.count] = scale · Σ_d Term(a[i][d], b[j][d]) over d = 0 … inner - 1, summed up in A.
// The same for (i, j) and (j, i) where a and b are the same rows.
template <class Term, class A, class T>
__global__ void pair_sums_kernel(Rows<T> a, Rows<T> b, int64_t batches, int64_t inner, A scale, A* out) {
  A* of_a = shared_memory<A>();
  A* of_b = of_a + pair_tile * pair_row;
  const int64_t down = (a.count + pair_tile - 1) / pair_tile, across = (b.count + pair_tile - 1) / pair_tile;
  const int row = threadIdx.x / pair_tile, column = threadIdx.x % pair_tile;
  for (int64_t tile = blockIdx.x; tile < batches * down * across; tile += gridDim.x) {
    const int64_t batch = tile / (down * across);
    const int64_t i = tile / across % down * pair_tile, j = tile % across * pair_tile;
    A total = 0;
    for (int64_t d = 0; d < inner; d += pair_depth) {
      load_tile(a, batch, i, d, inner, of_a);
      load_tile(b, batch, j, d, inner, of_b);
      __syncthreads();
      A sum = 0;  // of a part at a time: less is lost to rounding than in one long sum
      for (int e = 0; e < pair_depth; ++e) sum += Term::of(of_a[row * pair_row + e], of_b[column * pair_row + e]);
      total += sum;
      __syncthreads();
    }
    if (i + row < a.count && j + column < b.count) {
      out[(batch * a.count + i + row) * b.count + j + column] = scale * total;
    }
  }
}

template <class Term, class A, class T>
void pair_sums(const Device& device, Rows<T> a, Rows<T> b, int64_t batches, int64_t inner, A scale, A* out) {
  const int64_t down = (a.count + pair_tile - 1) / pair_tile, across = (b.count + pair_tile - 1) / pair_tile;
  device.launch(pair_sums_kernel<Term, A, T>, grid_for(batches * down * across, 1), pair_tile * pair_tile,
                2 * pair_tile * pair_row * sizeof(A), a, b, batches, inner, scale, out);
}

}  // namespace innerloop
