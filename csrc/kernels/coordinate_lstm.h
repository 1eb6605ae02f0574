#pragma once

#include <cstdint>

#include "kernels/isa.h"

namespace innerloop {

// The two-layer LSTM of a learned optimizer, unrolled over the steps of many coordinates that share its weights
// (Andrychowicz et al. 2016). Rows of gates in torch's order: input, forget, cell, output.
template <class T>
struct CoordinateLstm {
  int64_t steps;        // K
  int64_t coordinates;  // C
  int64_t hidden;       // H
  T p;                  // of the preprocessing
  const T* gradients;   // [K][C]
  const T* state;       // [4][H][C]: hidden and cell of the first layer, hidden and cell of the second
  const T* first;       // [4H][2 + H + 1]: of the preprocessed gradient, the hidden state, and 1
  const T* second;      // [4H][H + H + 1]
  const T* output;      // [H + 1]
};

// Its gradients; those that are null are not wanted.
template <class T>
struct CoordinateLstmGradients {
  const T* updates;  // [K][C], given
  const T* state;    // [4][H][C] of the last state, given; null: zeros
  T* first;          // added to: the weights'
  T* second;
  T* output;
  T* gradients;  // [K][C]
  T* start;      // [4][H][C], of the first state
};

}  // namespace innerloop

// updates [K][C] and the last state [4][H][C] of the coordinates begin … end-1. What a coordinate gets does not depend
// on the range that it is in.
INNERLOOP_DECLARE(void coordinate_lstm(const CoordinateLstm<float>& net, int64_t begin, int64_t end, float* updates,
                                       float* state))
INNERLOOP_DECLARE(void coordinate_lstm(const CoordinateLstm<double>& net, int64_t begin, int64_t end, double* updates,
                                       double* state))

// Back-propagation through all steps of the coordinates begin … end-1. It runs them forward again, a block of
// coordinates that stays in the cache at a time, so that no activation need be kept between the two.
INNERLOOP_DECLARE(void coordinate_lstm_backward(const CoordinateLstm<float>& net, int64_t begin, int64_t end,
                                                const CoordinateLstmGradients<float>& gradients))
INNERLOOP_DECLARE(void coordinate_lstm_backward(const CoordinateLstm<double>& net, int64_t begin, int64_t end,
                                                const CoordinateLstmGradients<double>& gradients))
