#pragma once

#include "kernels/isa.h"

// Products with matrices of few, long rows (embeddings). The type of the small matrix, out or coefficients, is that of
// the sums: float64 for what goes into a system to be solved, which may be ill-conditioned.

// out[i][j] = Σ_r a[i][r] b[j][r], rows of a and b of length inner. Of a triangle no more is needed than the products
// of each row with those up to itself: there a is the last a_rows of b.
INNERLOOP_DECLARE(void inner_products(const float* a, const float* b, int64_t a_rows, int64_t b_rows, int64_t inner,
                                      bool triangle, float* out, int64_t out_row))
INNERLOOP_DECLARE(void inner_products(const float* a, const float* b, int64_t a_rows, int64_t b_rows, int64_t inner,
                                      bool triangle, double* out, int64_t out_row))
INNERLOOP_DECLARE(void inner_products(const double* a, const double* b, int64_t a_rows, int64_t b_rows, int64_t inner,
                                      bool triangle, double* out, int64_t out_row))

// out[i][r] = Σ_j coefficients[i][j] rows[j][r] for the given columns of rows and out, whose rows are `row` apart.
// nontemporal: past the caches where the sums have the rows' type and the rows start vectors.
INNERLOOP_DECLARE(void combine_rows(const float* coefficients, const float* rows, int64_t out_rows, int64_t in_rows,
                                    int64_t columns, int64_t row, bool nontemporal, float* out))
INNERLOOP_DECLARE(void combine_rows(const double* coefficients, const float* rows, int64_t out_rows, int64_t in_rows,
                                    int64_t columns, int64_t row, bool nontemporal, float* out))
INNERLOOP_DECLARE(void combine_rows(const double* coefficients, const double* rows, int64_t out_rows, int64_t in_rows,
                                    int64_t columns, int64_t row, bool nontemporal, double* out))
