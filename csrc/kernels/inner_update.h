#pragma once

#include "kernels/isa.h"

// updated[i] = params[i] - lr * grads[i]; lr one number, or an array of the same size.
INNERLOOP_DECLARE(void inner_update(const float* params, const float* grads, const float* lr, bool lr_is_array,
                                    float* updated, int64_t count))
INNERLOOP_DECLARE(void inner_update(const double* params, const double* grads, const double* lr, bool lr_is_array,
                                    double* updated, int64_t count))
