// The first conv_block of a network with a 2×2 pooling, by the moments of its input's patches.
#pragma once

#include "engine/conv_block.h"

namespace innerloop::INNERLOOP_ISA {

// Whether a block is one: it reads the network's input, has a pooling and stride 1, and its patches are small.
bool is_first_block(const BlockNodes& nodes, const std::vector<ValueLayout>& values);

// Plain twin: make_conv_block.
template <class T>
std::unique_ptr<Layer<T>> make_first_block(const BlockNodes& nodes, const LayerContext<T>& context);

}  // namespace innerloop::INNERLOOP_ISA
