// Between torch's arrays, in which every task has its rows, and the executor's, in which every task has its lane.
#pragma once

#include <algorithm>
#include <cstdint>

#include "engine/lane_kernels.h"
#include "engine/request.h"

namespace innerloop::INNERLOOP_ISA {

// Tasks first … first + count − 1, one a lane; the lanes beyond are 0.
template <class T>
struct LaneTasks {
  static constexpr int L = lane_count<T>;

  int64_t first = 0, count = 0;

  // size numbers of every task [T, size], to lanes [size][L].
  void load(const T* rows, int64_t size, T* to) const {
    rows += first * size;
    for (int64_t e = 0; e < size; ++e) {
      for (int64_t lane = 0; lane < L; ++lane) to[e * L + lane] = lane < count ? rows[lane * size + e] : T(0);
    }
  }

  // The way back, times scale.
  void store(const T* from, int64_t size, T scale, T* rows) const {
    rows += first * size;
    for (int64_t lane = 0; lane < count; ++lane) {
      for (int64_t e = 0; e < size; ++e) rows[lane * size + e] = scale * from[e * L + lane];
    }
  }
};

// One side's samples of such tasks as the executor and its loss read them.
template <class T>
struct LaneSamples {
  static constexpr int L = lane_count<T>;

  int64_t count = 0;     // N
  T* x = nullptr;        // [inputs][N][L]
  T* targets = nullptr;  // [outputs][N][L]; for labels the distribution that cross-entropy compares with
  T* weights = nullptr;  // [N][L]: 1 / valid samples of the task, 0 for the others

  // A sample that does not count is 0 with weight 0, so that nothing of it, not even NaN, gets anywhere.
  void load(const LaneTasks<T>& tasks, const Samples<T>& from, int64_t inputs, int64_t outputs, T label_smoothing) {
    const int64_t N = count;
    const T even = label_smoothing / static_cast<T>(outputs);
    for (int64_t lane = 0; lane < L; ++lane) {
      const bool* mask = from.mask && lane < tasks.count ? from.mask + (tasks.first + lane) * N : nullptr;
      int64_t valid = 0;
      for (int64_t n = 0; n < N; ++n) {
        const bool counts = lane < tasks.count && (!mask || mask[n]);
        const int64_t index = (tasks.first + lane) * N + n;
        valid += counts;
        weights[n * L + lane] = counts ? T(1) : T(0);
        T* to = x + n * L + lane;
        for (int64_t i = 0; i < inputs; ++i) to[i * N * L] = counts ? from.x[index * inputs + i] : T(0);
        T* target = targets + n * L + lane;
        for (int64_t o = 0; o < outputs; ++o) {
          T value = 0;
          if (counts && from.targets) value = from.targets[index * outputs + o];
          if (counts && from.labels) value = even + (o == from.labels[index] ? 1 - label_smoothing : T(0));
          target[o * N * L] = value;
        }
      }
      for (int64_t n = 0; n < N; ++n) weights[n * L + lane] /= static_cast<T>(std::max<int64_t>(valid, 1));
    }
  }

  // The network's outputs y [outputs][N][L] for these samples, to [T, N, outputs].
  void store_outputs(const LaneTasks<T>& tasks, const T* y, int64_t outputs, T* to) const {
    to += tasks.first * count * outputs;
    for (int64_t lane = 0; lane < tasks.count; ++lane) {
      for (int64_t n = 0; n < count; ++n) {
        const bool counts = weights[n * L + lane] != 0;
        for (int64_t o = 0; o < outputs; ++o) *to++ = counts ? y[(o * count + n) * L + lane] : T(0);
      }
    }
  }
};

}  // namespace innerloop::INNERLOOP_ISA
