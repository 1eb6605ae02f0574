// How a convolution of the program looks to the kernels.
#pragma once

#include "engine/layout.h"
#include "engine/request.h"
#include "kernels/convolution.h"

namespace innerloop::INNERLOOP_ISA {

inline ConvolutionShape convolution_shape(const Window& window, const ValueLayout& x, int64_t outputs,
                                          int64_t output_halo) {
  return {.height = x.shape.height,
          .width = x.shape.width,
          .channels = x.stride,
          .halo = x.halo,
          .kernel_height = window.kernel_height,
          .kernel_width = window.kernel_width,
          .stride_height = window.stride_height,
          .stride_width = window.stride_width,
          .padding_height = window.pad_height,
          .padding_width = window.pad_width,
          .outputs = outputs,
          .output_halo = output_halo};
}

inline WinogradUse winograd_use(Use use) {
  return use == Use::off ? WinogradUse::off : use == Use::forced ? WinogradUse::forced : WinogradUse::automatic;
}

}  // namespace innerloop::INNERLOOP_ISA
