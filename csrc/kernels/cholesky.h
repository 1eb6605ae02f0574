#pragma once

#include "kernels/isa.h"

// Overwrites the upper triangle of a symmetric matrix [n, n] with U, UᵀU = the matrix; the rest is neither read nor
// written. Returns n, or the first row where the matrix is not positive definite to within rounding.
INNERLOOP_DECLARE(int64_t cholesky(double* matrix, int64_t n))

// Overwrites right [n, columns] with the solution of UᵀU x = right.
INNERLOOP_DECLARE(void cholesky_solve(const double* u, int64_t n, double* right, int64_t columns))
