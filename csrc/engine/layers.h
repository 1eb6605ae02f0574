// The plain layers, one for every kind of node.
#pragma once

#include <memory>
#include <vector>

#include "engine/layer.h"
#include "engine/memory.h"

namespace innerloop::INNERLOOP_ISA {

// What a layer is made from.
template <class T>
struct LayerContext {
  const Request<T>& request;
  const std::vector<ValueLayout>& values;          // by value
  const std::vector<PackedParameter>& parameters;  // by parameter
  int64_t max_samples;                             // of a pass
  // Of the worker that the layer belongs to.
  Memory<T>& memory;
  ConvolutionScratch<T>& scratch;

  const ValueLayout& value(int index) const { return values[static_cast<size_t>(index)]; }
  // Offset of a parameter in packed arrays; -1: the layer has none.
  int64_t offset(int parameter) const { return parameter < 0 ? -1 : parameters[static_cast<size_t>(parameter)].offset; }
};

template <class T>
std::unique_ptr<Layer<T>> make_linear(const Node& node, const LayerContext<T>& context);
template <class T>
std::unique_ptr<Layer<T>> make_conv2d(const Node& node, const LayerContext<T>& context);
template <class T>
std::unique_ptr<Layer<T>> make_batch_norm(const Node& node, const LayerContext<T>& context);
// layer_norm and group_norm: a layer norm is a group norm of one group with parameters of the sample's shape.
template <class T>
std::unique_ptr<Layer<T>> make_sample_norm(const Node& node, const LayerContext<T>& context);
template <class T>
std::unique_ptr<Layer<T>> make_activation(const Node& node, const LayerContext<T>& context);
// max_pool, avg_pool, global_avg_pool
template <class T>
std::unique_ptr<Layer<T>> make_pool(const Node& node, const LayerContext<T>& context);
// flatten, add
template <class T>
std::unique_ptr<Layer<T>> make_flatten(const Node& node, const LayerContext<T>& context);
template <class T>
std::unique_ptr<Layer<T>> make_add(const Node& node, const LayerContext<T>& context);

}  // namespace innerloop::INNERLOOP_ISA
