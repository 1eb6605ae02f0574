// The activations: functions of one number with their first two derivatives.
#pragma once

#include <cmath>
#include <numbers>

#include "program/program.h"

// Where nvcc compiles this, kernels call these functions too.
#ifdef __CUDACC__
#define INNERLOOP_HOST_DEVICE __host__ __device__
#else
#define INNERLOOP_HOST_DEVICE
#endif

namespace innerloop::INNERLOOP_ISA {

// A function is a struct of value(x), slope(x) = f′ and curvature(x) = f″. Where f″ is 0 everywhere it says so.

template <class T>
struct LeakyReLU {  // ReLU where the slope is 0; torch's f′(0) is the slope
  T negative_slope;
  static constexpr bool is_piecewise_linear = true;
  INNERLOOP_HOST_DEVICE T value(T x) const { return x > 0 ? x : negative_slope * x; }
  INNERLOOP_HOST_DEVICE T slope(T x) const { return x > 0 ? T(1) : negative_slope; }
  INNERLOOP_HOST_DEVICE T curvature(T) const { return 0; }
};

template <class T>
struct ReLU {  // not the above with slope 0: that would make NaN of infinity
  static constexpr bool is_piecewise_linear = true;
  INNERLOOP_HOST_DEVICE T value(T x) const { return x <= 0 ? T(0) : x; }  // NaN stays NaN, as in torch
  INNERLOOP_HOST_DEVICE T slope(T x) const { return x > 0 ? T(1) : T(0); }
  INNERLOOP_HOST_DEVICE T curvature(T) const { return 0; }
};

template <class T>
struct Tanh {
  static constexpr bool is_piecewise_linear = false;
  INNERLOOP_HOST_DEVICE T value(T x) const { return std::tanh(x); }
  INNERLOOP_HOST_DEVICE T slope(T x) const {
    const T y = std::tanh(x);
    return 1 - y * y;
  }
  INNERLOOP_HOST_DEVICE T curvature(T x) const {
    const T y = std::tanh(x);
    return -2 * y * (1 - y * y);
  }
};

template <class T>
struct Sigmoid {
  static constexpr bool is_piecewise_linear = false;
  INNERLOOP_HOST_DEVICE T value(T x) const { return 1 / (1 + std::exp(-x)); }
  INNERLOOP_HOST_DEVICE T slope(T x) const {
    const T y = value(x);
    return y * (1 - y);
  }
  INNERLOOP_HOST_DEVICE T curvature(T x) const {
    const T y = value(x);
    return y * (1 - y) * (1 - 2 * y);
  }
};

template <class T>
struct GeluErf {  // x Φ(x), with φ = Φ′
  static constexpr bool is_piecewise_linear = false;
  INNERLOOP_HOST_DEVICE static T cumulative(T x) { return T(0.5) * std::erfc(-x * std::numbers::sqrt2_v<T> / 2); }
  INNERLOOP_HOST_DEVICE static T density(T x) {
    return std::exp(-x * x / 2) * std::numbers::inv_sqrtpi_v<T> / std::numbers::sqrt2_v<T>;
  }
  INNERLOOP_HOST_DEVICE T value(T x) const { return x * cumulative(x); }
  INNERLOOP_HOST_DEVICE T slope(T x) const { return cumulative(x) + x * density(x); }
  INNERLOOP_HOST_DEVICE T curvature(T x) const { return (2 - x * x) * density(x); }
};

template <class T>
struct GeluTanh {  // x (1 + tanh u)/2 with u = √(2/π) (x + 0.044715 x³)
  static constexpr bool is_piecewise_linear = false;
  static constexpr T a = T(0.044715);
  static constexpr T b = std::numbers::sqrt2_v<T> * std::numbers::inv_sqrtpi_v<T>;
  INNERLOOP_HOST_DEVICE T value(T x) const { return T(0.5) * x * (1 + std::tanh(b * (x + a * x * x * x))); }
  INNERLOOP_HOST_DEVICE T slope(T x) const {
    const T h = std::tanh(b * (x + a * x * x * x)), u1 = b * (1 + 3 * a * x * x);
    return T(0.5) * (1 + h + x * (1 - h * h) * u1);
  }
  INNERLOOP_HOST_DEVICE T curvature(T x) const {
    const T h = std::tanh(b * (x + a * x * x * x)), u1 = b * (1 + 3 * a * x * x), u2 = 6 * a * b * x;
    return (1 - h * h) * (u1 + T(0.5) * x * (u2 - 2 * h * u1 * u1));
  }
};

// Calls work(f) with the function of an activation node, and returns what that returns.
template <class T, class Work>
auto with_activation(const Node& node, const Work& work) {
  switch (node.kind) {
    case Kind::relu:
      return work(ReLU<T>{});
    case Kind::leaky_relu:
      return work(LeakyReLU<T>{static_cast<T>(node.number)});
    case Kind::tanh:
      return work(Tanh<T>{});
    case Kind::sigmoid:
      return work(Sigmoid<T>{});
    default:  // gelu
      return node.flag ? work(GeluTanh<T>{}) : work(GeluErf<T>{});
  }
}

}  // namespace innerloop::INNERLOOP_ISA
