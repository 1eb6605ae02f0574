#include "kernels/prototypes.h"

#include <algorithm>

#include "kernels/nontemporal.h"

namespace innerloop::INNERLOOP_ISA {
namespace {

template <class T>
void means_of(const T* __restrict embeddings, const int64_t* labels, int64_t samples, int64_t classes, int64_t dim,
              T* __restrict means, T* __restrict weights) {
  std::fill(means, means + classes * dim, T(0));
  std::fill(weights, weights + classes, T(0));
  for (int64_t s = 0; s < samples; ++s) {
    if (labels[s] < 0) continue;
    weights[labels[s]] += 1;
    T* mean = means + labels[s] * dim;
    const T* sample = embeddings + s * dim;
    for (int64_t d = 0; d < dim; ++d) mean[d] += sample[d];
  }
  for (int64_t c = 0; c < classes; ++c) {
    if (weights[c] == 0) continue;
    weights[c] = 1 / weights[c];
    for (int64_t d = 0; d < dim; ++d) means[c * dim + d] *= weights[c];
  }
}

template <Store kind, class T>
void spread(const T* __restrict gradient, const T* __restrict weights, const int64_t* labels, int64_t samples,
            int64_t dim, int64_t first, int64_t last, T* __restrict out) {
  const int64_t whole = last - (last - first) % lanes<T>;
  for (int64_t s = 0; s < samples; ++s) {
    T* sample = out + s * dim;
    if (labels[s] < 0) {
      std::fill(sample + first, sample + last, T(0));
      continue;
    }
    const T weight = weights[labels[s]];
    const T* row = gradient + labels[s] * dim;
    for (int64_t d = first; d < whole; d += lanes<T>) store<kind>(sample + d, weight * load(row + d));
    for (int64_t d = whole; d < last; ++d) sample[d] = weight * row[d];
  }
  if constexpr (kind == Store::nontemporal) finish_stores();
}

template <class T>
void spread(const T* gradient, const T* weights, const int64_t* labels, int64_t samples, int64_t dim, int64_t first,
            int64_t last, bool nontemporal, T* out) {
  if (nontemporal && starts_vectors(out + first, dim)) {
    spread<Store::nontemporal>(gradient, weights, labels, samples, dim, first, last, out);
  } else {
    spread<Store::cached>(gradient, weights, labels, samples, dim, first, last, out);
  }
}

}  // namespace

void class_means(const float* embeddings, const int64_t* labels, int64_t samples, int64_t classes, int64_t dim,
                 float* means, float* weights) {
  means_of(embeddings, labels, samples, classes, dim, means, weights);
}

void class_means(const double* embeddings, const int64_t* labels, int64_t samples, int64_t classes, int64_t dim,
                 double* means, double* weights) {
  means_of(embeddings, labels, samples, classes, dim, means, weights);
}

void class_means_backward(const float* gradient, const float* weights, const int64_t* labels, int64_t samples,
                          int64_t dim, int64_t first, int64_t last, bool nontemporal, float* out) {
  spread(gradient, weights, labels, samples, dim, first, last, nontemporal, out);
}

void class_means_backward(const double* gradient, const double* weights, const int64_t* labels, int64_t samples,
                          int64_t dim, int64_t first, int64_t last, bool nontemporal, double* out) {
  spread(gradient, weights, labels, samples, dim, first, last, nontemporal, out);
}

}  // namespace innerloop::INNERLOOP_ISA
