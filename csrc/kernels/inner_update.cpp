#include "kernels/inner_update.h"

namespace innerloop::INNERLOOP_ISA {
namespace {

template <class T>
void update(const T* __restrict params, const T* __restrict grads, const T* __restrict lr, bool lr_is_array,
            T* __restrict updated, int64_t count) {
  if (lr_is_array) {
    for (int64_t i = 0; i < count; ++i) updated[i] = params[i] - lr[i] * grads[i];
  } else {
    const T rate = *lr;
    for (int64_t i = 0; i < count; ++i) updated[i] = params[i] - rate * grads[i];
  }
}

}  // namespace

void inner_update(const float* params, const float* grads, const float* lr, bool lr_is_array, float* updated,
                  int64_t count) {
  update(params, grads, lr, lr_is_array, updated, count);
}

void inner_update(const double* params, const double* grads, const double* lr, bool lr_is_array, double* updated,
                  int64_t count) {
  update(params, grads, lr, lr_is_array, updated, count);
}

}  // namespace innerloop::INNERLOOP_ISA
