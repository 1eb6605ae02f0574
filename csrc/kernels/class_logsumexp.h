#pragma once

#include "kernels/isa.h"

// out[i][c] = log Σ exp(a[i][s]) over the samples s with labels[s] = c, of rows a [rows, samples]; −∞ for a class
// without any. A label of -1 is no class.
INNERLOOP_DECLARE(void class_logsumexp(const float* a, const int64_t* labels, int64_t rows, int64_t samples,
                                       int64_t classes, float* out))
INNERLOOP_DECLARE(void class_logsumexp(const double* a, const int64_t* labels, int64_t rows, int64_t samples,
                                       int64_t classes, double* out))
