// Products in which every SIMD lane belongs to a task of its own: no transposes, no padding, no sums across lanes.
//
// An array of the lanes executor has the lanes as its innermost dimension: values [feature][sample][L], parameters
// [outputs][inputs][L]. A number that all tasks share (θ₀, say) is read as it is and spread over the lanes.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <utility>

#include "kernels/simd.h"

namespace innerloop::INNERLOOP_ISA {

// Tasks of a vector. Of AVX-512's only half is used: with 8 floats as fast on the reference machine and 10% faster on
// wide networks, whose tasks then fit its caches, and fewer lanes are left empty.
template <class T>
constexpr int lane_count = std::min(vector_bytes, 32) / static_cast<int>(sizeof(T));

template <class T, int L>
struct LanesOf {
  typedef T type __attribute__((vector_size(sizeof(T) * L)));
};

// One number of each of L tasks.
template <class T, int L>
using Lanes = typename LanesOf<T, L>::type;

template <class T, int L>
inline Lanes<T, L> load_lanes(const T* from) {
  Lanes<T, L> v;
  std::memcpy(&v, from, sizeof(v));
  return v;
}

template <class T, int L>
inline Lanes<T, L> spread(T number) {
  return number - Lanes<T, L>{};
}

// shared: one number for all tasks; else L of them.
template <class T, int L, bool shared>
inline Lanes<T, L> read(const T* from) {
  if constexpr (shared) {
    return spread<T, L>(*from);
  } else {
    return load_lanes<T, L>(from);
  }
}

template <class T, int L>
inline void store_lanes(T* to, Lanes<T, L> v) {
  std::memcpy(to, &v, sizeof(v));
}

// In every lane what is in the one whose number differs in one bit.
template <int bit, class V, int... I>
inline V lanes_apart(V v, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(v, v, (I ^ bit)...);
}

// The sum over the lanes, by halves.
template <class T, int L>
inline T sum_lanes(Lanes<T, L> v) {
  if constexpr (L == 1) {
    return v[0];
  } else {
    Lanes<T, L / 2> low, high;
    std::memcpy(&low, &v, sizeof(low));
    std::memcpy(&high, reinterpret_cast<const char*>(&v) + sizeof(low), sizeof(high));
    return sum_lanes<T, L / 2>(low + high);
  }
}

// The sum over the lanes, in every lane.
template <class T, int L, int distance = L / 2>
inline Lanes<T, L> sum_everywhere(Lanes<T, L> v) {
  if constexpr (distance == 0) {
    return v;
  } else {
    return sum_everywhere<T, L, distance / 2>(v + lanes_apart<distance>(v, std::make_integer_sequence<int, L>()));
  }
}

// A(p, r) and B(q, r), r < length, with the distances between neighbours in memory. Without length it is 0.
template <class T>
struct LaneProduct {
  const T* a = nullptr;
  int64_t a_p = 0, a_r = 0;
  const T* b = nullptr;
  int64_t b_q = 0, b_r = 0;
  int64_t length = 0;
};

// As many sums as the registers hold beside a column of B and one element of A.
constexpr int lane_tile = vector_registers >= 32 ? 5 : 3;

template <class T, int L, bool shared, int P, int Q>
inline __attribute__((always_inline)) void add_products(const LaneProduct<T>& product, int64_t p, int64_t q,
                                                        Lanes<T, L> (&sums)[P][Q]) {
  const T* a = product.a + p * product.a_p;
  const T* b = product.b + q * product.b_q;
  for (int64_t r = 0; r < product.length; ++r, a += product.a_r, b += product.b_r) {
    Lanes<T, L> column[Q];
    INNERLOOP_UNROLL
    for (int j = 0; j < Q; ++j) column[j] = read<T, L, shared>(b + j * product.b_q);
    INNERLOOP_UNROLL
    for (int i = 0; i < P; ++i) {
      const Lanes<T, L> x = load_lanes<T, L>(a + i * product.a_p);
      INNERLOOP_UNROLL
      for (int j = 0; j < Q; ++j) sums[i][j] += x * column[j];
    }
  }
}

template <class T, int L, bool shared, int P, int Q, class First, class Last>
inline __attribute__((always_inline)) void product_tile(const LaneProduct<T>& moving, const LaneProduct<T>& fixed,
                                                        int64_t p, int64_t q, const First& first, const Last& last) {
  Lanes<T, L> sums[P][Q];
  INNERLOOP_UNROLL
  for (int i = 0; i < P; ++i) {
    INNERLOOP_UNROLL
    for (int j = 0; j < Q; ++j) sums[i][j] = first(q + j);
  }
  add_products<T, L, false>(moving, p, q, sums);
  add_products<T, L, shared>(fixed, p, q, sums);
  INNERLOOP_UNROLL
  for (int i = 0; i < P; ++i) {
    INNERLOOP_UNROLL
    for (int j = 0; j < Q; ++j) last(p + i, q + j, sums[i][j]);
  }
}

// For every p < P, q < Q:  last(p, q, first(q) + Σ_r A₁(p, r)·B₁(q, r) + Σ_r A₂(p, r)·B₂(q, r)).
// shared: B₂ is one number for all tasks.
template <class T, int L, bool shared, class First, class Last>
__attribute__((noinline)) void lane_products(int64_t P, int64_t Q, const LaneProduct<T> one, const LaneProduct<T> two,
                                             const First first, const Last last) {
  constexpr int N = lane_tile;
  for (int64_t q = 0; q < Q;) {
    const bool wide = Q - q >= N;
    for (int64_t p = 0; p < P;) {
      const bool tall = P - p >= N;
      if (tall && wide) {
        product_tile<T, L, shared, N, N>(one, two, p, q, first, last);
      } else if (tall) {
        product_tile<T, L, shared, N, 1>(one, two, p, q, first, last);
      } else if (wide) {
        product_tile<T, L, shared, 1, N>(one, two, p, q, first, last);
      } else {
        product_tile<T, L, shared, 1, 1>(one, two, p, q, first, last);
      }
      p += tall ? N : 1;
    }
    q += wide ? N : 1;
  }
}

}  // namespace innerloop::INNERLOOP_ISA
