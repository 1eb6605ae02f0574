// A program as the GPU executor walks it.
#pragma once

#include <memory>

#include "cuda/engine/layer.h"

namespace innerloop::gpu {

template <class T>
Graph make_graph(const Request<T>& request);

// Numbers in a sample of the largest gradient that may have to be added to another: of a value that is read more than
// once, or at the boundary.
int64_t largest_collected(const Program& program, const Graph& graph);

template <class T>
std::unique_ptr<Layer<T>> make_layer(const Step& step, const LayerContext<T>& context);

}  // namespace innerloop::gpu
