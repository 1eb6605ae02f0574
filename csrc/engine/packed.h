// Packed arrays of all parameters: θ₀ and the rates brought into the layers' layout, gradients brought back.
#pragma once

#include <algorithm>
#include <vector>

#include "engine/plan.h"
#include "kernels/gemm.h"

namespace innerloop::INNERLOOP_ISA {

// α of one parameter at one step: an array over the packed parameter, or one number.
template <class T>
struct RateAt {
  const T* elements = nullptr;
  T number = 0;
};

// α of one adapted parameter, packed.
template <class T>
class PackedRate {
 public:
  PackedRate() = default;  // of a parameter that is not adapted
  PackedRate(const RateArgument<T>& rate, const PackedParameter& parameter, int64_t steps)
      : per_element_(rate.per_element), rows_(rate.per_step ? steps : 1), width_(width_of(rate, parameter)) {
    values_.assign(static_cast<size_t>(rows_ * width_), T(0));
    for (int64_t row = 0; row < rows_; ++row) {
      T* to = values_.data() + row * width_;
      if (!per_element_) {
        *to = rate.data[row];
        continue;
      }
      const T* from = rate.data + row * parameter.size();
      parameter.for_each([&](int64_t index, int64_t packed) { to[packed - parameter.offset] = from[index]; });
    }
  }

  RateAt<T> at(int64_t step) const {
    const T* row = values_.data() + row_of(step) * width_;
    return per_element_ ? RateAt<T>{row, 0} : RateAt<T>{nullptr, *row};
  }
  bool per_element() const { return per_element_; }
  int64_t width() const { return width_; }
  size_t size() const { return values_.size(); }
  int64_t row_of(int64_t step) const { return rows_ > 1 ? step : 0; }

  // to += a gradient in the shape of this rate, times scale, in torch's layout.
  void unpack(const T* gradient, const PackedParameter& parameter, T scale, T* to) const {
    for (int64_t row = 0; row < rows_; ++row, gradient += width_) {
      if (!per_element_) {
        to[row] += scale * *gradient;
        continue;
      }
      parameter.for_each([&](int64_t index, int64_t packed) {
        to[row * parameter.size() + index] += scale * gradient[packed - parameter.offset];
      });
    }
  }

 private:
  static int64_t width_of(const RateArgument<T>& rate, const PackedParameter& parameter) {
    return rate.per_element ? parameter.packed_size() : 1;
  }

  bool per_element_ = false;
  int64_t rows_ = 0, width_ = 0;
  std::vector<T> values_;
};

template <class T>
void add_scaled(const T* __restrict from, int64_t count, T scale, T* __restrict to) {
  for (int64_t i = 0; i < count; ++i) to[i] += scale * from[i];
}

template <class T>
void pack(const T* from, const PackedParameter& parameter, T* packed) {
  if (parameter.taps == 1) {
    transpose(parameter.outputs, parameter.inputs, from, parameter.inputs, packed + parameter.offset,
              parameter.output_stride);
    return;
  }
  parameter.for_each([&](int64_t index, int64_t place) { packed[place] = from[index]; });
}

// to += scale times the packed parameter, in torch's layout.
template <class T>
void unpack(const T* packed, const PackedParameter& parameter, T scale, T* to) {
  if (parameter.taps == 1) {
    constexpr int64_t strip = 16;
    std::vector<T> transposed(static_cast<size_t>(strip * parameter.inputs));
    for (int64_t o = 0; o < parameter.outputs; o += strip) {
      const int64_t count = std::min(strip, parameter.outputs - o), size = count * parameter.inputs;
      transpose(parameter.inputs, count, packed + parameter.offset + o, parameter.output_stride, transposed.data(),
                parameter.inputs);
      add_scaled(transposed.data(), size, scale, to + o * parameter.inputs);
    }
    return;
  }
  parameter.for_each([&](int64_t index, int64_t place) { to[index] += scale * packed[place]; });
}

}  // namespace innerloop::INNERLOOP_ISA
