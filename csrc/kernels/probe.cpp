#include "kernels/isa.h"
INNERLOOP_DECLARE(int probe())
namespace innerloop::INNERLOOP_ISA {
int probe() {
  return 1;
}
}  // namespace innerloop::INNERLOOP_ISA
