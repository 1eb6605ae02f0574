// Which executor runs a request.
#include "engine/blocks.h"
#include "engine/lanes.h"
#include "engine/request.h"
#include "engine/split.h"

namespace innerloop::INNERLOOP_ISA {
namespace {

template <class T>
std::unique_ptr<Engine<T>> choose(const Request<T>& request) {
  if (request.paths.lanes == Use::off || !lanes_apply(request)) return make_blocks_engine(request);
  if (request.paths.lanes == Use::forced) return make_lanes_engine(request);
  const int64_t by_lanes = tasks_for_lanes(request);
  if (by_lanes == 0) return make_blocks_engine(request);
  if (by_lanes == request.tasks) return make_lanes_engine(request);
  return std::make_unique<SplitEngine<T>>(request, by_lanes, make_lanes_engine<T>, make_blocks_engine<T>);
}

}  // namespace

std::unique_ptr<Engine<float>> make_engine(const Request<float>& request) {
  return choose(request);
}

std::unique_ptr<Engine<double>> make_engine(const Request<double>& request) {
  return choose(request);
}

}  // namespace innerloop::INNERLOOP_ISA
