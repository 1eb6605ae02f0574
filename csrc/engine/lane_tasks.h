// Between torch's arrays, in which every task has its rows, and the executor's, in which every task has its lane.
#pragma once

#include <algorithm>
#include <cstdint>

#include "engine/lane_kernels.h"
#include "engine/request.h"

namespace innerloop::INNERLOOP_ISA {

// What the lanes are: tasks first … first + count − 1, one a lane, the lanes beyond being 0; or, spread, the samples of
// task first alone, sample n in row n / L and lane n % L. Then all that is one number of the task, a parameter, say, is
// the same in every lane.
template <class T>
struct LaneTasks {
  static constexpr int L = lane_count<T>;

  int64_t first = 0, count = 0;
  bool spread = false;

  int64_t rows(int64_t samples) const { return spread ? (samples + L - 1) / L : samples; }

  // The index of the sample in a row and a lane among those [T, samples] of all tasks; −1: there is none.
  int64_t sample_at(int64_t row, int64_t lane, int64_t samples) const {
    if (!spread) return lane < count ? (first + lane) * samples + row : -1;
    return row * L + lane < samples ? first * samples + row * L + lane : -1;
  }

  // size numbers of every task [T, size], to lanes [size][L].
  void load(const T* numbers, int64_t size, T* to) const {
    numbers += first * size;
    const int64_t distance = spread ? 0 : size, filled = spread ? L : count;
    for (int64_t e = 0; e < size; ++e) {
      for (int64_t lane = 0; lane < L; ++lane) to[e * L + lane] = lane < filled ? numbers[lane * distance + e] : T(0);
    }
  }

  // The way back, times scale.
  void store(const T* from, int64_t size, T scale, T* numbers) const {
    numbers += first * size;
    for (int64_t lane = 0; lane < count; ++lane) {
      for (int64_t e = 0; e < size; ++e) numbers[lane * size + e] = scale * from[e * L + lane];
    }
  }
};

// One side's samples of such tasks as the executor and its loss read them.
template <class T>
struct LaneSamples {
  static constexpr int L = lane_count<T>;

  int64_t rows = 0;      // N
  T* x = nullptr;        // [inputs][N][L]
  T* targets = nullptr;  // [outputs][N][L]; for labels the distribution that cross-entropy compares with
  T* weights = nullptr;  // [N][L]: 1 / valid samples of the task, 0 for the others

  // A sample that does not count is 0 with weight 0, so that nothing of it, not even NaN, gets anywhere.
  void load(const LaneTasks<T>& tasks, const Samples<T>& from, int64_t inputs, int64_t outputs, T label_smoothing) {
    const int64_t N = rows = from.x ? tasks.rows(from.count) : 0;
    const T even = label_smoothing / static_cast<T>(outputs);
    int64_t valid[L] = {}, all = 0;
    for (int64_t lane = 0; lane < L; ++lane) {
      for (int64_t n = 0; n < N; ++n) {
        const int64_t index = tasks.sample_at(n, lane, from.count);
        const bool counts = index >= 0 && (!from.mask || from.mask[index]);
        valid[lane] += counts;
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
      all += valid[lane];
    }
    for (int64_t lane = 0; lane < L; ++lane) {
      const int64_t samples = std::max<int64_t>(tasks.spread ? all : valid[lane], 1);
      for (int64_t n = 0; n < N; ++n) weights[n * L + lane] /= static_cast<T>(samples);
    }
  }

  // The network's outputs y [outputs][N][L] for these samples, to [T, samples, outputs].
  void store_outputs(const LaneTasks<T>& tasks, const T* y, int64_t samples, int64_t outputs, T* to) const {
    for (int64_t lane = 0; lane < L; ++lane) {
      for (int64_t n = 0; n < rows; ++n) {
        const int64_t index = tasks.sample_at(n, lane, samples);
        if (index < 0) continue;
        const bool counts = weights[n * L + lane] != 0;
        for (int64_t o = 0; o < outputs; ++o) to[index * outputs + o] = counts ? y[(o * rows + n) * L + lane] : T(0);
      }
    }
  }
};

}  // namespace innerloop::INNERLOOP_ISA
