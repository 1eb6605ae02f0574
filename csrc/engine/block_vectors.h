// What the fused blocks share: vectors of choices, and sums over many pixels.
#pragma once

#include <cstring>
#include <type_traits>

#include "kernels/simd.h"

namespace innerloop::INNERLOOP_ISA {

// Integers as wide as T. A block keeps one for each of its outputs: which element of the pooling window the output came
// from (row · 2 + column, the first maximum), or −1 where the ReLU lets nothing through.
template <class T>
using Index = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;

template <class T>
using IndexVector = decltype(Vector<T>{} > Vector<T>{});

template <class T>
inline IndexVector<T> load_indices(const Index<T>* from) {
  IndexVector<T> v;
  std::memcpy(&v, from, sizeof(v));
  return v;
}

template <class T>
inline void store_indices(Index<T>* to, IndexVector<T> v) {
  std::memcpy(to, &v, sizeof(v));
}

// value where the mask holds, 0 elsewhere.
template <class T>
inline Vector<T> where(IndexVector<T> mask, Vector<T> value) {
  return mask ? value : Vector<T>{};
}

// The best of a pooling window so far.
template <class T>
struct Maximum {
  Vector<T> value;
  IndexVector<T> index;

  explicit Maximum(Vector<T> first) : value(first), index{} {}
  IndexVector<T> offer(Vector<T> candidate, int position) {
    const IndexVector<T> better = candidate > value;
    value = better ? candidate : value;
    index = better ? IndexVector<T>{} + position : index;
    return better;
  }
};

// ReLU of the maximum: stores the output and the choice. NaN passes, as in torch.
template <class T>
inline void store_rectified(const Maximum<T>& maximum, T* y, Index<T>* choice) {
  store(y, maximum.value <= 0 ? Vector<T>{} : maximum.value);
  store_indices<T>(choice, maximum.value > 0 ? maximum.index : IndexVector<T>{} - 1);
}

// Sums of vectors over many pixels: short runs in T, those added up in double.
template <class T>
class DoubleSum {
 public:
  void add(Vector<T> run) {
    for (int i = 0; i < lanes<T>; ++i) total_[i] += static_cast<double>(run[i]);
  }
  // The sums times scale, as T.
  Vector<T> scaled(double scale) const {
    Vector<T> result;
    for (int i = 0; i < lanes<T>; ++i) result[i] = static_cast<T>(total_[i] * scale);
    return result;
  }

 private:
  double total_[lanes<T>] = {};
};

}  // namespace innerloop::INNERLOOP_ISA
