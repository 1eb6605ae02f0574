// The blocks executor: one task at a time on a thread, layer by layer.
#pragma once

#include <memory>

#include "engine/request.h"

namespace innerloop::INNERLOOP_ISA {

template <class T>
std::unique_ptr<Engine<T>> make_blocks_engine(const Request<T>& request);

}  // namespace innerloop::INNERLOOP_ISA
