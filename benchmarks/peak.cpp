// What one core can do: fused multiply-adds on registers, and copying memory. machine.py compiles and runs it.

#include <cstdio>
#include <cstring>
#include <ctime>
#include <vector>

namespace {

#if defined(__AVX512F__)
constexpr int kBytes = 64;
#elif defined(__AVX__)
constexpr int kBytes = 32;
#else
constexpr int kBytes = 16;
#endif
using Vector = float __attribute__((vector_size(kBytes)));
constexpr int kLanes = kBytes / sizeof(float);
constexpr int kChains = 12;  // more than latency × units, so that no multiply-add waits for the last

double now() {
  return static_cast<double>(std::clock()) / CLOCKS_PER_SEC;
}  // of this process alone

template <class Work>
double best_seconds(Work work) {
  double best = 1e9;
  for (int repetition = 0; repetition < 10; ++repetition) {
    const double start = now();
    work();
    const double seconds = now() - start;
    if (seconds < best) best = seconds;
  }
  return best;
}

}  // namespace

int main() {
  Vector sums[kChains] = {};
  volatile float source = 0.999f;
  const Vector factor = Vector{} + source;
  constexpr int kRounds = 4'000'000;
  const double multiply_add = best_seconds([&] {
    for (int round = 0; round < kRounds; ++round) {
#pragma GCC unroll 12
      for (int chain = 0; chain < kChains; ++chain) sums[chain] = sums[chain] * factor + factor;
    }
  });
  Vector total = {};
  for (const Vector& sum : sums) total += sum;

  std::vector<float> from(32 << 20, total[0]), to(from.size());
  const size_t bytes = from.size() * sizeof(float);
  const double copy = best_seconds([&] { std::memcpy(to.data(), from.data(), bytes); });

  std::printf("{\"fma_gflops\": %.1f, \"copy_gigabytes\": %.1f, \"read\": %g}\n",
              2.0 * kRounds * kChains * kLanes / multiply_add * 1e-9, 2.0 * bytes / copy * 1e-9, to[1]);
}
