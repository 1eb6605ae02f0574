"""What the closed-form heads are made of: products with the embeddings and the solution of small systems, which are
float64 whatever the embeddings' dtype. Each is differentiable to any order: its derivatives are made of the same
functions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import innerloop._library  # noqa: F401 (defines the ops)
from innerloop import reference
from innerloop.ops._differentiable import Arguments, differentiable


def _setup(ctx: Any, arguments: Arguments, output: Tensor) -> None:
    ctx.save_for_backward(*arguments)
    ctx.save_for_forward(*arguments)


def _products_fake(a: Tensor, b: Tensor, float64: bool) -> Tensor:
    return a.new_empty(*a.shape[:2], b.shape[1], dtype=torch.float64 if float64 else a.dtype)


def _products_setup(ctx: Any, arguments: Arguments, output: Tensor) -> None:
    a, b, ctx.float64 = arguments
    ctx.save_for_backward(a, b)
    ctx.save_for_forward(a, b)


def _products_backward(ctx: Any, gradient: Tensor) -> Arguments:
    a, b = ctx.saved_tensors
    return combine_rows(gradient, b), combine_rows(gradient.mT, a), None


def _products_jvp(ctx: Any, along_a: Tensor, along_b: Tensor, _: Any) -> Tensor:
    a, b = ctx.saved_tensors
    return inner_products(along_a, b, ctx.float64) + inner_products(a, along_b, ctx.float64)


def _products_twin(a: Tensor, b: Tensor, float64: bool) -> Tensor:
    return a.double() @ b.double().mT if float64 else a @ b.mT


def _gram_fake(rows: Tensor) -> Tensor:
    return rows.new_empty(*rows.shape[:2], rows.shape[1], dtype=torch.float64)


def _gram_backward(ctx: Any, gradient: Tensor) -> Tensor:
    (rows,) = ctx.saved_tensors
    result: Tensor = combine_rows(gradient + gradient.mT, rows)
    return result


def _gram_jvp(ctx: Any, along: Tensor) -> Tensor:
    (rows,) = ctx.saved_tensors
    half: Tensor = inner_products(along, rows, True)
    return half + half.mT


def _combine_fake(coefficients: Tensor, rows: Tensor) -> Tensor:
    return rows.new_empty(*coefficients.shape[:2], rows.shape[2])


def _combine_backward(ctx: Any, gradient: Tensor) -> Arguments:
    coefficients, rows = ctx.saved_tensors
    for_coefficients = inner_products(gradient, rows, coefficients.dtype == torch.float64)
    return for_coefficients, combine_rows(coefficients.mT, gradient)


def _combine_jvp(ctx: Any, along_coefficients: Tensor, along_rows: Tensor) -> Tensor:
    coefficients, rows = ctx.saved_tensors
    result: Tensor = combine_rows(along_coefficients, rows) + combine_rows(coefficients, along_rows)
    return result


def _solve_fake(matrix: Tensor, right: Tensor) -> Tensor:
    return right.new_empty(right.shape)


def _solve_setup(ctx: Any, arguments: Arguments, output: Tensor) -> None:
    ctx.save_for_backward(arguments[0], output)
    ctx.save_for_forward(arguments[0], output)


def _solve_backward(ctx: Any, gradient: Tensor) -> Arguments:
    matrix, solution = ctx.saved_tensors
    for_right = solve_positive_definite(matrix, gradient)
    return -(for_right @ solution.mT), for_right


def _solve_jvp(ctx: Any, along_matrix: Tensor, along_right: Tensor) -> Tensor:
    matrix, solution = ctx.saved_tensors
    result: Tensor = solve_positive_definite(matrix, along_right - along_matrix @ solution)
    return result


#: a [T, A, D], b [T, B, D], whether the sums and the result are float64 → their inner products [T, A, B].
inner_products = differentiable(
    "inner_products",
    fake=_products_fake,
    setup_context=_products_setup,
    backward=_products_backward,
    jvp=_products_jvp,
    twin=_products_twin,
)
#: rows [T, S, D] → their inner products with one another [T, S, S] float64, exactly symmetric.
gram_matrix = differentiable(
    "gram_matrix",
    fake=_gram_fake,
    setup_context=_setup,
    backward=_gram_backward,
    jvp=_gram_jvp,
    twin=lambda rows: rows.double() @ rows.double().mT,
)
#: coefficients [T, A, B], float64 or of the rows' dtype, rows [T, B, D] → their product [T, A, D] in the rows' dtype,
#: its sums in the coefficients'.
combine_rows = differentiable(
    "combine_rows",
    fake=_combine_fake,
    setup_context=_setup,
    backward=_combine_backward,
    jvp=_combine_jvp,
    twin=lambda coefficients, rows: (coefficients @ rows.to(coefficients.dtype)).to(rows.dtype),
)
#: matrix [T, M, M] float64, symmetric and positive definite; right [T, M, N] → matrix⁻¹ right, by Cholesky. Raises
#: RuntimeError where the matrix of a task is not positive definite.
solve_positive_definite = differentiable(
    "solve_positive_definite",
    fake=_solve_fake,
    setup_context=_solve_setup,
    backward=_solve_backward,
    jvp=_solve_jvp,
    twin=reference.solve_positive_definite,
)
