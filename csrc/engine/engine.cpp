// Which executor runs a request.
#include "engine/blocks.h"
#include "engine/lanes.h"
#include "engine/request.h"

namespace innerloop::INNERLOOP_ISA {
namespace {

template <class T>
std::unique_ptr<Engine<T>> choose(const Request<T>& request) {
  const Use lanes = request.paths.lanes;
  if (lanes == Use::off || !lanes_apply(request)) return make_blocks_engine(request);
  return lanes == Use::forced || lanes_pay(request) ? make_lanes_engine(request) : make_blocks_engine(request);
}

}  // namespace

std::unique_ptr<Engine<float>> make_engine(const Request<float>& request) {
  return choose(request);
}

std::unique_ptr<Engine<double>> make_engine(const Request<double>& request) {
  return choose(request);
}

}  // namespace innerloop::INNERLOOP_ISA
