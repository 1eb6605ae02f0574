// Stores past the caches.
#pragma once

#include <cstdint>

#include "kernels/simd.h"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace innerloop::INNERLOOP_ISA {

// Where results go: into the caches, or past them to memory, whose former contents are then not read. The latter pays
// where results are more than the caches hold.
enum class Store : uint8_t { cached, nontemporal };

// A non-temporal store wants the address of a whole vector.
template <Store kind, class T>
inline void store(T* to, Vector<T> v) {
#if defined(__AVX512F__)
  if constexpr (kind == Store::nontemporal) return _mm512_stream_si512(reinterpret_cast<__m512i*>(to), (__m512i)v);
#elif defined(__AVX__)
  if constexpr (kind == Store::nontemporal) return _mm256_stream_si256(reinterpret_cast<__m256i*>(to), (__m256i)v);
#elif defined(__SSE2__)
  if constexpr (kind == Store::nontemporal) return _mm_stream_si128(reinterpret_cast<__m128i*>(to), (__m128i)v);
#endif
  store(to, v);
}

// Rows that begin here and lie so far apart can be stored past the caches.
template <class T>
inline bool starts_vectors(const T* rows, int64_t row) {
  return reinterpret_cast<uintptr_t>(rows) % vector_bytes == 0 && row % lanes<T> == 0;
}

// After non-temporal stores, before other threads are told of the results.
inline void finish_stores() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

}  // namespace innerloop::INNERLOOP_ISA
