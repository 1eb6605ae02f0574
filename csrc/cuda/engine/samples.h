// What the executor does to samples, outputs and losses: functions of one index, for each().
#pragma once

#include <cstdint>

#include "cuda/launch.h"

namespace innerloop::gpu {

// From torch's [channels][pixels] to channels-last; what a mask leaves out is 0, whatever it holds.
template <class T>
struct LoadSamples {
  const T* from;
  const bool* mask;
  int64_t channels, pixels;
  T* to;
  __device__ void operator()(int64_t i) const {
    const int64_t c = i % channels, pixel = i / channels % pixels, n = i / channels / pixels;
    to[i] = mask == nullptr || mask[n] ? from[(n * channels + c) * pixels + pixel] : T(0);
  }
};

template <class T>
struct CountValid {
  const bool* mask;
  int64_t samples;
  T* valid;
  __device__ void operator()(int64_t task) const {
    int64_t count = mask == nullptr ? samples : 0;
    for (int64_t n = 0; mask != nullptr && n < samples; ++n) count += mask[task * samples + n] ? 1 : 0;
    valid[task] = static_cast<T>(count);
  }
};

template <class T>
struct StoreLogits {  // what a mask leaves out stays 0
  const T* from;
  const bool* mask;
  int64_t outputs;
  T* to;
  __device__ void operator()(int64_t i) const {
    if (mask == nullptr || mask[i / outputs]) to[i] = from[i];
  }
};

template <class T>
struct AddScaledValues {
  const T* from;
  T scale;
  T* to;
  __device__ void operator()(int64_t i) const { to[i] += scale * from[i]; }
};

template <class T>
struct StoreLosses {
  const double* from;
  T* to;
  __device__ void operator()(int64_t i) const { to[i] = static_cast<T>(from[i]); }
};

template <class T>
struct StoreMean {  // one index
  const T* losses;
  int64_t tasks;
  T* mean;
  __device__ void operator()(int64_t) const {
    double sum = 0;
    for (int64_t task = 0; task < tasks; ++task) sum += static_cast<double>(losses[task]);
    *mean = static_cast<T>(sum / static_cast<double>(tasks));
  }
};

}  // namespace innerloop::gpu
