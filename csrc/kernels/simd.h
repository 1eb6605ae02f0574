// Vectors of the instruction set that a file is compiled for, by GCC's and clang's vector extension.
#pragma once

#include <cstdint>
#include <cstring>

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

template <class T>
inline T sum(Vector<T> v) {
  T total = 0;
  for (int i = 0; i < lanes<T>; ++i) total += v[i];
  return total;
}

}  // namespace innerloop::INNERLOOP_ISA
