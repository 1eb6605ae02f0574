#pragma once

#include "kernels/isa.h"

// Products with matrices of few, long rows (embeddings), summed in float64 whatever the type of the rows: what the
// closed-form heads solve is small, but may be ill-conditioned.

// out[i][j] = Σ_r a[i][r] b[j][r], rows of a and b of length inner.
INNERLOOP_DECLARE(void inner_products(const float* a, const float* b, int64_t a_rows, int64_t b_rows, int64_t inner,
                                      double* out, int64_t out_row))
INNERLOOP_DECLARE(void inner_products(const double* a, const double* b, int64_t a_rows, int64_t b_rows, int64_t inner,
                                      double* out, int64_t out_row))

// out[i][r] = Σ_j coefficients[i][j] rows[j][r] for the given columns of rows and out, whose rows are `row` apart.
INNERLOOP_DECLARE(void combine_rows(const double* coefficients, const float* rows, int64_t out_rows, int64_t in_rows,
                                    int64_t columns, int64_t row, float* out))
INNERLOOP_DECLARE(void combine_rows(const double* coefficients, const double* rows, int64_t out_rows, int64_t in_rows,
                                    int64_t columns, int64_t row, double* out))
