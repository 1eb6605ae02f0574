// Where things lie in the memory of the blocks executor: values channels-last, parameters packed.
#pragma once

#include <cstdint>

#include "kernels/simd.h"
#include "program/program.h"

namespace innerloop::INNERLOOP_ISA {

inline int64_t round_up(int64_t size, int64_t multiple) {
  return (size + multiple - 1) / multiple * multiple;
}

// A value of N samples: [N][height + 2·halo][width + 2·halo][stride]. The halo is 0, and so are the channels beyond
// shape.channels, in values, in gradients and in the tangents of both: a layer may compute with whole vectors, and the
// padding of weights stays 0 under descent. A value's gradient is dense: the same without the halo. Every buffer has
// slack for one vector after its end.
struct ValueLayout {
  Shape shape;
  int64_t stride = 0;  // of a pixel: channels, padded to whole vectors (the network's input may be unpadded)
  int64_t halo = 0;

  int64_t pixels() const { return shape.height * shape.width; }
  int64_t row_pitch() const { return (shape.width + 2 * halo) * stride; }
  int64_t sample_size() const { return (shape.height + 2 * halo) * row_pitch(); }
  int64_t dense_row() const { return shape.width * stride; }
  int64_t dense_size() const { return pixels() * stride; }
  // Offset of row h of sample n inside the halo; a row is width·stride contiguous elements.
  int64_t row(int64_t n, int64_t h) const { return n * sample_size() + (h + halo) * row_pitch() + halo * stride; }
};

// A parameter in the packed array θ: torch's element (o, i, t) of [outputs, inputs, taps] lies at
// offset + (t·input_stride + i)·output_stride + o. Linear: taps = 1. Convolution: taps = kernel positions. A vector:
// inputs = taps = 1. A parameter of the sample's shape [C, H, W]: outputs = C, taps = H·W. What lies between is 0.
struct PackedParameter {
  int64_t offset = 0;
  int64_t outputs = 1, inputs = 1, taps = 1;
  int64_t input_stride = 1, output_stride = 1;

  int64_t packed_size() const { return taps * input_stride * output_stride; }
  int64_t size() const { return outputs * inputs * taps; }

  // Calls visit(index in torch's layout, index in the packed array) for every element, output innermost.
  template <class Visit>
  void for_each(const Visit& visit) const {
    for (int64_t t = 0; t < taps; ++t) {
      for (int64_t i = 0; i < inputs; ++i) {
        for (int64_t o = 0; o < outputs; ++o) {
          visit((o * inputs + i) * taps + t, offset + (t * input_stride + i) * output_stride + o);
        }
      }
    }
  }
};

}  // namespace innerloop::INNERLOOP_ISA
