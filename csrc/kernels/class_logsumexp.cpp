#include "kernels/class_logsumexp.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "kernels/exponential.h"

namespace innerloop::INNERLOOP_ISA {
namespace {

template <class T>
void logsumexp(const T* a, const int64_t* labels, int64_t rows, int64_t samples, int64_t classes, T* out) {
  constexpr int L = lanes<T>;
  const int64_t width = (samples + L - 1) / L * L;
  std::vector<T> exponentials(static_cast<size_t>(width)), sums(static_cast<size_t>(classes));
  for (int64_t i = 0; i < rows; ++i, a += samples, out += classes) {
    T* tops = out;
    std::fill(tops, tops + classes, -std::numeric_limits<T>::infinity());
    std::fill(sums.begin(), sums.end(), T(0));
    for (int64_t s = 0; s < samples; ++s) {
      if (labels[s] >= 0 && !(a[s] <= tops[labels[s]])) tops[labels[s]] = a[s];  // NaN stays
    }
    for (int64_t s = 0; s < samples; ++s) {  // −∞ less −∞ would not be a number
      const bool counts = labels[s] >= 0 && tops[labels[s]] != -std::numeric_limits<T>::infinity();
      exponentials[static_cast<size_t>(s)] = counts ? a[s] - tops[labels[s]] : -std::numeric_limits<T>::infinity();
    }
    for (int64_t s = 0; s < width; s += L) {
      store(exponentials.data() + s, exponential(load(exponentials.data() + s)));
    }
    for (int64_t s = 0; s < samples; ++s) {
      if (labels[s] >= 0) sums[static_cast<size_t>(labels[s])] += exponentials[static_cast<size_t>(s)];
    }
    for (int64_t c = 0; c < classes; ++c) out[c] = tops[c] + std::log(sums[static_cast<size_t>(c)]);
  }
}

}  // namespace

void class_logsumexp(const float* a, const int64_t* labels, int64_t rows, int64_t samples, int64_t classes,
                     float* out) {
  logsumexp(a, labels, rows, samples, classes, out);
}

void class_logsumexp(const double* a, const int64_t* labels, int64_t rows, int64_t samples, int64_t classes,
                     double* out) {
  logsumexp(a, labels, rows, samples, classes, out);
}

}  // namespace innerloop::INNERLOOP_ISA
