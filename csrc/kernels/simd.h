// Vectors of the instruction set that a file is compiled for, by GCC's and clang's vector extension.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

// Before a loop of constant length that must be written out, so that the arrays it indexes live in registers.
#if defined(__clang__)
#define INNERLOOP_UNROLL _Pragma("clang loop unroll(full)")
#else
#define INNERLOOP_UNROLL _Pragma("GCC unroll 16")
#endif

namespace innerloop::INNERLOOP_ISA {

#if defined(__AVX512F__)
constexpr int vector_bytes = 64;
#elif defined(__AVX__)
constexpr int vector_bytes = 32;
#else
constexpr int vector_bytes = 16;
#endif

// Vector registers of the instruction set: what the shapes of register tiles are made for.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int vector_registers = 32;
#else
constexpr int vector_registers = 16;
#endif

template <class T>
struct VectorOf {
  typedef T type __attribute__((vector_size(vector_bytes)));
};

template <class T>
using Vector = typename VectorOf<T>::type;

// Elements of a vector.
template <class T>
constexpr int lanes = vector_bytes / static_cast<int>(sizeof(T));

// Memory of any alignment; memcpy of a constant size is one instruction.
template <class T>
inline Vector<T> load(const T* from) {
  Vector<T> v;
  std::memcpy(&v, from, sizeof(v));
  return v;
}

template <class T>
inline void store(T* to, Vector<T> v) {
  std::memcpy(to, &v, sizeof(v));
}

// The number in every lane. Subtracting 0 changes nothing, so that this is one instruction; adding it would make −0 a
// 0, and takes an addition for each number.
template <class T>
inline Vector<T> broadcast(T number) {
  return number - Vector<T>{};
}

// The first count elements, zeros after them.
template <class T>
inline Vector<T> load_part(const T* from, int64_t count) {
  Vector<T> v{};
  for (int64_t i = 0; i < count; ++i) v[i] = from[i];
  return v;
}

template <int First, class V, int... I>
inline auto lanes_from(V v, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(v, v, (First + I)...);
}

// The elements of a vector, combined in pairs, pairs of pairs, …: halves first, then inside of 16 bytes.
template <class V, class Combine>
inline auto folded(V v, const Combine& combine) {
  constexpr int count = sizeof(v) / sizeof(v[0]);
  if constexpr (sizeof(v) > 16) {
    constexpr auto half = std::make_integer_sequence<int, count / 2>();
    return folded(combine(lanes_from<0>(v, half), lanes_from<count / 2>(v, half)), combine);
  } else {
    constexpr auto all = std::make_integer_sequence<int, count>();
    if constexpr (count == 4) v = combine(v, lanes_from<2>(v, all));
    return combine(v, lanes_from<1>(v, all))[0];
  }
}

template <class T>
inline T sum(Vector<T> v) {
  return folded(v, [](auto a, auto b) { return a + b; });
}

}  // namespace innerloop::INNERLOOP_ISA
