// One source, one binary, several instruction sets.
//
// Every .cpp of csrc/kernels and csrc/engine is compiled once per instruction set, in the namespace
// innerloop::INNERLOOP_ISA (the macro comes from CMake). The rest of the code is compiled once, for the
// baseline, and calls a kernel through INNERLOOP_CALL, which picks the best set this CPU has.
#pragma once

#include <cstdint>

#if defined(__x86_64__)
// clang-format off
#define INNERLOOP_DECLARE(...) \
  namespace innerloop::v4 { __VA_ARGS__; }       \
  namespace innerloop::v3 { __VA_ARGS__; }       \
  namespace innerloop::baseline { __VA_ARGS__; }
// clang-format on
#define INNERLOOP_CALL(function, ...)                                                         \
  (::innerloop::isa() == ::innerloop::Isa::v4                                                 \
       ? ::innerloop::v4::function(__VA_ARGS__)                                               \
       : (::innerloop::isa() == ::innerloop::Isa::v3 ? ::innerloop::v3::function(__VA_ARGS__) \
                                                     : ::innerloop::baseline::function(__VA_ARGS__)))
#else
// clang-format off
#define INNERLOOP_DECLARE(...) namespace innerloop::baseline { __VA_ARGS__; }
// clang-format on
#define INNERLOOP_CALL(function, ...) ::innerloop::baseline::function(__VA_ARGS__)
#endif

namespace innerloop {

// x86-64 micro-architecture levels: v4 has AVX-512, v3 has AVX2 and FMA; baseline is whatever the compiler's
// default for the platform is (SSE2 on x86-64, NEON on aarch64).
enum class Isa : uint8_t { baseline, v3, v4 };

// The instruction set in use: the best one of this CPU, or a lower one named by INNERLOOP_ISA in the environment
// (baseline, v3, v4) for tests. Decided once, at load.
Isa isa();
const char* isa_name();

}  // namespace innerloop
