#pragma once

#include "kernels/isa.h"

// Squared Euclidean distances between rows and points, as ‖a‖² − 2 a·b + ‖b‖², a matrix product; where that is small
// beside the norms, and rounding has eaten much of it, from differences. So identical points have distance 0 exactly,
// none is negative, and none has lost more than a few digits.

// out [rows, points] = scale · ‖a[i] − b[j]‖² for rows a [rows, dim] and points b [points, dim].
INNERLOOP_DECLARE(void squared_distances(const float* a, const float* b, int64_t rows, int64_t points, int64_t dim,
                                         float scale, float* out))
INNERLOOP_DECLARE(void squared_distances(const double* a, const double* b, int64_t rows, int64_t points, int64_t dim,
                                         double scale, double* out))

// The same as logits, with their cross-entropy: returns Σ over rows of −log softmax(out)[label]; gradient [rows,
// points] = weight times its gradient. A row with the label -1 enters neither.
INNERLOOP_DECLARE(double squared_distances_loss(const float* a, const float* b, int64_t rows, int64_t points,
                                                int64_t dim, float scale, const int64_t* labels, float weight,
                                                float* out, float* gradient))
INNERLOOP_DECLARE(double squared_distances_loss(const double* a, const double* b, int64_t rows, int64_t points,
                                                int64_t dim, double scale, const int64_t* labels, double weight,
                                                double* out, double* gradient))

// The gradients of scale · ‖a[i] − b[j]‖² for the columns first … last−1 of a [rows, dim] and b [points, dim], given
// the gradient g [rows, points]:  to_a[i] = 2 scale Σⱼ g[i,j] (a[i] − b[j]),  to_b[j] = 2 scale Σᵢ g[i,j] (b[j] −
// a[i]). nontemporal: to_a goes past the caches where its rows start vectors.
INNERLOOP_DECLARE(void squared_distances_backward(const float* g, float scale, const float* a, const float* b,
                                                  int64_t rows, int64_t points, int64_t dim, int64_t first,
                                                  int64_t last, bool nontemporal, float* to_a, float* to_b))
INNERLOOP_DECLARE(void squared_distances_backward(const double* g, double scale, const double* a, const double* b,
                                                  int64_t rows, int64_t points, int64_t dim, int64_t first,
                                                  int64_t last, bool nontemporal, double* to_a, double* to_b))
