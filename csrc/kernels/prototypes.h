#pragma once

#include "kernels/isa.h"

// One task: means [classes, dim] of the embeddings [samples, dim] of each class. A label of -1 is no class.
// weights [classes] receives 1 / (number of samples of the class), 0 for a class without samples.
INNERLOOP_DECLARE(void class_means(const float* embeddings, const int64_t* labels, int64_t samples, int64_t classes,
                                   int64_t dim, float* means, float* weights))
INNERLOOP_DECLARE(void class_means(const double* embeddings, const int64_t* labels, int64_t samples, int64_t classes,
                                   int64_t dim, double* means, double* weights))

// Its transpose, for the columns first … last-1: each sample [samples, dim] receives its class's gradient [classes,
// dim] times the class's weight. nontemporal: past the caches where the rows start vectors.
INNERLOOP_DECLARE(void class_means_backward(const float* gradient, const float* weights, const int64_t* labels,
                                            int64_t samples, int64_t dim, int64_t first, int64_t last, bool nontemporal,
                                            float* out))
INNERLOOP_DECLARE(void class_means_backward(const double* gradient, const double* weights, const int64_t* labels,
                                            int64_t samples, int64_t dim, int64_t first, int64_t last, bool nontemporal,
                                            double* out))
