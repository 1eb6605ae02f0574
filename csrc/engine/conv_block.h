// Convolution, BatchNorm with batch statistics, ReLU and a 2×2 max-pooling (or none) as one layer.
#pragma once

#include "engine/layers.h"

namespace innerloop::INNERLOOP_ISA {

// The nodes of a block; pool is null where there is none.
struct BlockNodes {
  const Node* conv = nullptr;
  const Node* norm = nullptr;
  const Node* relu = nullptr;
  const Node* pool = nullptr;
};

// Plain twins: conv2d, batch_norm, relu, max_pool.
template <class T>
std::unique_ptr<Layer<T>> make_conv_block(const BlockNodes& nodes, const LayerContext<T>& context);

}  // namespace innerloop::INNERLOOP_ISA
