// A Linear layer whose input does not change over the inner steps, without its updated weights ever being formed.
#pragma once

#include "engine/layers.h"

namespace innerloop::INNERLOOP_ISA {

// Whether such a layer's weight has the α that this needs: one number, for all steps or for each.
template <class T>
bool low_rank_applies(const Node& node, const Request<T>& request);

// Whether it takes fewer operations than the plain layer.
template <class T>
bool low_rank_pays(const Node& node, const Request<T>& request);

template <class T>
std::unique_ptr<Layer<T>> make_low_rank_linear(const Node& node, const LayerContext<T>& context);

}  // namespace innerloop::INNERLOOP_ISA
