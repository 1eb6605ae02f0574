// The lanes executor: the SIMD lane is the task. For small chains of Linear layers, whose products are too small to
// fill vectors one task at a time.
#pragma once

#include <memory>

#include "engine/request.h"

namespace innerloop::INNERLOOP_ISA {

// Whether the network is one that lanes can run: Linear layers one after the other, each with an activation or none.
template <class T>
bool lanes_apply(const Request<T>& request);

// Whether the tasks are expected to be faster in lanes than one at a time.
template <class T>
bool lanes_pay(const Request<T>& request);

template <class T>
std::unique_ptr<Engine<T>> make_lanes_engine(const Request<T>& request);

}  // namespace innerloop::INNERLOOP_ISA
