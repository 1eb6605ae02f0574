// e^x of a vector, for softmaxes: of numbers that are not positive, −∞ and NaN included.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>

#include "kernels/simd.h"

namespace innerloop::INNERLOOP_ISA {

inline Vector<double> exponential(Vector<double> x) {
  for (int i = 0; i < lanes<double>; ++i) x[i] = std::exp(x[i]);
  return x;
}

// x = k ln 2 + r with |r| ≤ ln 2 / 2: 2ᵏ times a polynomial in r (Cephes' expf), within 2 units in the last place.
inline Vector<float> exponential(Vector<float> x) {
  typedef int32_t Integers __attribute__((vector_size(vector_bytes)));
  constexpr float round = 12582912.0f;  // 1.5·2²³: a number of size < 2²² added to it is rounded to an integer
  const Vector<float> shifted = x * 1.44269504f + round, k = shifted - round;
  const Vector<float> r = x - k * 0.693359375f - k * -2.12194440e-4f;
  Vector<float> p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const Integers exponent = (Integers)shifted - std::bit_cast<int32_t>(round) + 127;
  return x < -87.0f ? Vector<float>{} : p * (Vector<float>)(exponent << 23);
}

}  // namespace innerloop::INNERLOOP_ISA
