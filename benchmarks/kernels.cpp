// Speed of the convolution kernels, GFLOP/s of the direct sum (a Winograd form does fewer and can exceed the machine's
// peak). From the root of the repository:
//
//     c++ -std=gnu++20 -O3 -Wno-psabi -march=x86-64-v4 -DINNERLOOP_ISA=v4 -Icsrc benchmarks/kernels.cpp
//         csrc/kernels/{gemm,winograd,convolution}.cpp -o /tmp/kernels && /tmp/kernels
#include <algorithm>
#include <cstdio>
#include <ctime>
#include <vector>

#include "kernels/convolution.h"

using namespace innerloop::INNERLOOP_ISA;

namespace {

double cpu_seconds() {
  timespec t;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
  return static_cast<double>(t.tv_sec) + 1e-9 * static_cast<double>(t.tv_nsec);
}

// Median time of a call, of 15 runs of about 10 ms each.
template <class Call>
double seconds_of(Call call) {
  double start = cpu_seconds();
  call();
  const int repeats = static_cast<int>(std::max(1.0, 0.01 / (cpu_seconds() - start)));
  std::vector<double> times;
  for (int run = 0; run < 15; ++run) {
    start = cpu_seconds();
    for (int i = 0; i < repeats; ++i) call();
    times.push_back((cpu_seconds() - start) / repeats);
  }
  std::nth_element(times.begin(), times.begin() + 7, times.end());
  return times[7];
}

void measure(int64_t images, int64_t size, int64_t channels, int64_t outputs, WinogradUse use) {
  const ConvolutionShape shape{.height = size,
                               .width = size,
                               .channels = channels,
                               .halo = 1,
                               .kernel_height = 3,
                               .kernel_width = 3,
                               .stride_height = 1,
                               .stride_width = 1,
                               .padding_height = 1,
                               .padding_width = 1,
                               .outputs = outputs,
                               .output_halo = 0};
  const Convolution<float> convolution(shape, use);
  const auto array = [](int64_t n) {
    std::vector<float> values(static_cast<size_t>(n) + 64);
    for (size_t i = 0; i < values.size(); ++i) values[i] = 0.01f * static_cast<float>(i % 97) - 0.5f;
    return values;
  };
  const int64_t input = (size + 2) * (size + 2) * channels, gradient = (size + 2) * (size + 2) * outputs;
  const auto x = array(images * input), moved = array(images * input), dy = array(images * gradient);
  auto y = array(images * size * size * outputs), dx = array(images * size * size * channels);
  const auto w = array(convolution.weights_size());
  auto prepared = array(convolution.prepared_size()), other = prepared, scratch = array(convolution.scratch_size());
  auto dw = w;
  const double flops = 2.0 * 9 * static_cast<double>(images * size * size * channels * outputs);

  const double forward = seconds_of([&] {
    convolution.forward(images, x.data(), convolution.prepare_forward(w.data(), prepared.data()), nullptr, y.data(),
                        scratch.data());
  });
  const double tangent = seconds_of([&] {
    convolution.tangent(images,
                        {{x.data(), convolution.prepare_tangent(w.data(), prepared.data())},
                         {moved.data(), convolution.prepare_tangent(w.data(), other.data())}},
                        nullptr, y.data(), scratch.data());
  });
  const double input_gradient = channels % lanes<float> != 0 ? 0 : seconds_of([&] {
    convolution.input_gradient(images, {{dy.data(), convolution.prepare_input_gradient(w.data(), prepared.data())}},
                               dx.data(), scratch.data());
  });
  const double weight_gradient = seconds_of([&] {
    convolution.start_weight_gradient(scratch.data());
    const int64_t group = convolution.group();
    for (int64_t n = 0; n < images; n += group) {
      convolution.add_weight_gradient(std::min(group, images - n), x.data() + n * input, dy.data() + n * gradient,
                                      dw.data(), scratch.data());
    }
    convolution.finish_weight_gradient(dw.data(), scratch.data());
  });
  const auto rate = [&](double seconds, int terms) { return seconds > 0 ? terms * flops / seconds * 1e-9 : 0.0; };
  std::printf("| %ld, %ldx%ld, %ld→%ld | F(%d) / F(%d) | %.0f | %.0f | %.0f | %.0f |\n", long(images), long(size),
              long(size), long(channels), long(outputs), convolution.forward_tile(), convolution.tile(),
              rate(forward, 1), rate(tangent, 2), rate(input_gradient, 1), rate(weight_gradient, 1));
}

}  // namespace

int main() {
  std::printf("| images, size, channels | tiles | forward | tangent | input gradient | weight gradient |\n");
  std::printf("|---|---|---|---|---|---|\n");
  for (const WinogradUse use : {WinogradUse::off, WinogradUse::automatic}) {
    for (const int64_t images : {5, 75}) {
      measure(images, 28, 1, 64, use);
      for (const int64_t size : {14, 7, 3}) measure(images, size, 64, 64, use);
    }
    measure(25, 84, 3, 32, use);
    for (const int64_t size : {42, 21, 10, 5}) measure(25, size, 32, 32, use);
  }
}
