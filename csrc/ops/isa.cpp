#include "kernels/isa.h"

#include <torch/csrc/stable/library.h>

#include <cstdlib>
#include <string>

namespace innerloop {
namespace {

Isa best_isa() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("x86-64-v4")) return Isa::v4;
  if (__builtin_cpu_supports("x86-64-v3")) return Isa::v3;
#endif
  return Isa::baseline;
}

Isa chosen_isa() {
  const Isa best = best_isa();
  const char* wish = std::getenv("INNERLOOP_ISA");
  if (wish == nullptr) return best;
  const std::string name = wish;
  Isa wanted = best;
  if (name == "baseline") wanted = Isa::baseline;
  if (name == "v3") wanted = Isa::v3;
  return wanted < best ? wanted : best;  // never more than the CPU has
}

const Isa chosen = chosen_isa();

}  // namespace

Isa isa() {
  return chosen;
}

const char* isa_name() {
  switch (chosen) {
    case Isa::v4:
      return "x86-64-v4 (AVX-512)";
    case Isa::v3:
      return "x86-64-v3 (AVX2)";
    default:
      return "baseline";
  }
}

namespace {
std::string instruction_set() {
  return isa_name();
}
}  // namespace

}  // namespace innerloop

STABLE_TORCH_LIBRARY_FRAGMENT(innerloop, m) {
  m.def("instruction_set() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(innerloop, CompositeExplicitAutograd, m) {
  m.impl("instruction_set", TORCH_BOX(&innerloop::instruction_set));
}
