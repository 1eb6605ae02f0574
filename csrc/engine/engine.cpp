// Which executor runs a request.
#include "engine/blocks.h"
#include "engine/request.h"

namespace innerloop::INNERLOOP_ISA {

std::unique_ptr<Engine<float>> make_engine(const Request<float>& request) {
  return make_blocks_engine(request);
}

std::unique_ptr<Engine<double>> make_engine(const Request<double>& request) {
  return make_blocks_engine(request);
}

}  // namespace innerloop::INNERLOOP_ISA
