#pragma once

#include "kernels/isa.h"

// Squared Euclidean distances [rows, points] between rows a [rows, dim] and points b [points, dim], summed from
// differences: identical points have distance 0 exactly, and none is negative.
INNERLOOP_DECLARE(void squared_distances(const float* a, const float* b, int64_t rows, int64_t points, int64_t dim,
                                         float* out))
INNERLOOP_DECLARE(void squared_distances(const double* a, const double* b, int64_t rows, int64_t points, int64_t dim,
                                         double* out))

// Their gradient for the rows: out[i] = 2 Σⱼ gradient[i·row_stride + j·point_stride] (a[i] − b[j]), [rows, dim]. With
// the roles of a and b and the strides exchanged, the gradient for the points.
INNERLOOP_DECLARE(void squared_distances_backward(const float* gradient, int64_t row_stride, int64_t point_stride,
                                                  const float* a, const float* b, int64_t rows, int64_t points,
                                                  int64_t dim, float* out))
INNERLOOP_DECLARE(void squared_distances_backward(const double* gradient, int64_t row_stride, int64_t point_stride,
                                                  const double* a, const double* b, int64_t rows, int64_t points,
                                                  int64_t dim, double* out))
