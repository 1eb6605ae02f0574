// tanh and sigmoid of a vector.
#pragma once

#include <cmath>

#include "kernels/simd.h"

namespace innerloop::INNERLOOP_ISA {

inline Vector<double> tanh_of(Vector<double> x) {
  for (int i = 0; i < lanes<double>; ++i) x[i] = std::tanh(x[i]);
  return x;
}

// A quotient of polynomials (Eigen's ptanh), within a few units in the last place; NaN stays NaN.
inline Vector<float> tanh_of(Vector<float> x) {
  constexpr float end = 7.90531111f;  // beyond it the quotient is ±1
  const auto clamped = [](Vector<float> v) {
    v = v > end ? Vector<float>{} + end : v;
    return v < -end ? Vector<float>{} - end : v;
  };
  x = clamped(x);
  const Vector<float> z = x * x;
  Vector<float> p = z * -2.76076847742355e-16f + 2.00018790482477e-13f;
  p = p * z - 8.60467152213735e-11f;
  p = p * z + 5.12229709037114e-08f;
  p = p * z + 1.48572235717979e-05f;
  p = p * z + 6.37261928875436e-04f;
  p = p * z + 4.89352455891786e-03f;
  Vector<float> q = z * 1.19825839466702e-06f + 1.18534705686654e-04f;
  q = q * z + 2.26843463243900e-03f;
  q = q * z + 4.89352518554385e-03f;
  return x * p / q;
}

// Exact to a unit in the last place of 1: enough for a gate, whose small values are added to large ones.
template <class T>
inline Vector<T> sigmoid(Vector<T> x) {
  return T(0.5) + T(0.5) * tanh_of(T(0.5) * x);
}

}  // namespace innerloop::INNERLOOP_ISA
