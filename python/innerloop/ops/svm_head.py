"""The support vector machine of each task's support set, differentiable through its optimality conditions."""

from __future__ import annotations

from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

import innerloop._library  # noqa: F401 (defines the ops)
from innerloop import reference
from innerloop.ops._differentiable import Arguments, differentiable
from innerloop.ops._systems import combine_rows, inner_products
from innerloop.ops.checks import (
    check_dims,
    check_float,
    check_integer,
    check_kernel,
    check_number,
    check_positive,
    check_same_space,
    checked_labels,
)

Tensors = tuple[Tensor, ...]


class SvmSolution(NamedTuple):
    """Of :func:`svm_solve`.

    Attributes:
        weights: w_k of every class, [T, N, D] in support's dtype, differentiable.
        dual: α [T, S, N] float64, differentiable: w_k = Σₛ α[s][k] x_s.
        residual: [T] float64, the duality gap over the primal objective.
        iterations: [T] int64.
    """

    weights: Tensor
    dual: Tensor
    residual: Tensor
    iterations: Tensor


def svm_head(
    support: Tensor,
    labels: Tensor,
    queries: Tensor,
    num_classes: int,
    *,
    C: float = 0.1,
    max_iterations: int = 50,
    tolerance: float = 1e-10,
    diagonal: float = 0.0,
    mask: Tensor | None = None,
) -> Tensor:
    """w_k · x of the queries, by the multi-class support vector machine of each task's support set (MetaOptNet, Lee et
    al. 2019, section 3.3; Crammer & Singer 2001).

    The machine is that of :func:`svm_solve`, whose arguments and errors these are.

    Args:
        queries: [T, Q, D], support's dtype.

    Returns: scores [T, Q, N] in support's dtype, differentiable once in support and queries. MetaOptNet scales them by
    a learned number before the softmax.

    Examples:
        >>> support = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
        >>> scores = innerloop.ops.svm_head(support, torch.tensor([[0, 1]]), queries=support, num_classes=2)
        >>> scores.argmax(2)
        tensor([[0, 1]])
    """
    check_same_space(queries, support, "support", "[T, S, D]")
    solution = svm_solve(
        support,
        labels,
        num_classes,
        C=C,
        max_iterations=max_iterations,
        tolerance=tolerance,
        diagonal=diagonal,
        mask=mask,
    )
    scores: Tensor = inner_products(queries, solution.weights, False)
    return scores


def svm_solve(
    support: Tensor,
    labels: Tensor,
    num_classes: int,
    *,
    C: float = 0.1,
    max_iterations: int = 50,
    tolerance: float = 1e-10,
    diagonal: float = 0.0,
    mask: Tensor | None = None,
) -> SvmSolution:
    """The multi-class support vector machine of each task (Crammer & Singer 2001): the w_k that minimise
    ½ Σₖ ‖w_k‖² + C Σₛ ξₛ subject to w_y·xₛ − w_k·xₛ ≥ 1 − (k = y) − ξₛ for every sample s, of class y, and class k.

    It solves the dual, ½ Σₖ αₖᵀ (XXᵀ) αₖ − Σₛ α[s][yₛ] subject to Σₖ α[s][k] = 0 and α[s][k] ≤ C·(k = yₛ), in float64
    by a primal-dual interior-point method, and is differentiated implicitly, through the KKT system at the solution.
    Differentiable once in support; a second derivative raises.

    Args:
        support: X, [T, S, D] float32 or float64.
        labels: [T, S] int64, 0 … num_classes-1 in any order.
        num_classes: N.
        C: what a unit of slack ξ costs.
        max_iterations: of the solver.
        tolerance: it has converged when the duality gap is at most tolerance times the primal objective, or when no
            more is left of the gap than float64's rounding.
        diagonal: what is added to the diagonal of XXᵀ. The paper's program has 0; the authors' code adds 1, which
            makes the α of any support set unique.
        mask: [T, S] bool, False where a support sample is padding and counts nowhere. None: all count.

    Returns: weights, α, and what convergence was reached.

    Raises:
        TypeError, ValueError: dtypes, shapes or devices that do not fit together, a label out of range, or a number
            that is not positive.
        RuntimeError: a task has not converged within max_iterations, or its embeddings are not finite; the message
            names the task and its gap. From backward, where the gradient is to be differentiated again.
    """
    check_float(support, "support")
    check_dims(support, "support", "[T, S, D]")
    check_kernel("svm_solve", support, "support")
    for name, number in (("C", C), ("tolerance", tolerance), ("num_classes", num_classes)):
        check_positive(number, name)
    check_integer(max_iterations, "max_iterations")
    check_number(diagonal, "diagonal")
    if not diagonal >= 0:
        raise ValueError(f"diagonal is {diagonal}, expected at least 0")
    labels = checked_labels(labels, "labels", support, "support", "[T, S]", num_classes, mask)
    if mask is not None:
        support = torch.where(mask[:, :, None], support, 0)
    weights, dual, _, _, residual, iterations = _weights(
        support, labels, num_classes, C, max_iterations, tolerance, diagonal
    )
    return SvmSolution(weights, dual, residual, iterations)


torch.library.define(
    "innerloop::svm_weights",
    "(Tensor support, Tensor labels, int num_classes, float C, int max_iterations, float tolerance, float diagonal) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)


@torch.library.impl("innerloop::svm_weights", ("cpu", "cuda"))
def _weights_of_support(
    support: Tensor,
    labels: Tensor,
    num_classes: int,
    C: float,
    max_iterations: int,
    tolerance: float,
    diagonal: float,
) -> Tensors:
    """(weights [T, N, D], α [T, S, N], the KKT system's diagonal [T, S, N], Gram matrices [T, S, S], residuals [T],
    iterations [T])."""
    check_float(support, "support")
    check_dims(support, "support", "[T, S, D]")
    ops = torch.ops.innerloop
    gram = ops.gram_matrix(support)
    gram.diagonal(dim1=1, dim2=2).add_(diagonal)
    dual, curvature, residual, iterations = ops.svm_solve(gram, labels, num_classes, C, max_iterations, tolerance)
    return ops.combine_rows(dual.mT.to(support.dtype), support), dual, curvature, gram, residual, iterations


def _fake(support: Tensor, labels: Tensor, num_classes: int, *_: float) -> Tensors:
    tasks, samples, dim = support.shape
    dual = support.new_empty(tasks, samples, num_classes, dtype=torch.float64)
    return (
        support.new_empty(tasks, num_classes, dim),
        dual,
        torch.empty_like(dual),
        dual.new_empty(tasks, samples, samples),
        dual.new_empty(tasks),
        labels.new_empty(tasks),
    )


def _setup(ctx: Any, arguments: Arguments, output: Tensors) -> None:
    support, labels = arguments[:2]
    weights, dual, curvature, gram, residual, iterations = output
    ctx.save_for_backward(support, labels, weights, dual, curvature, gram)
    ctx.save_for_forward(support, labels, weights, dual, curvature, gram)
    ctx.mark_non_differentiable(curvature, gram, residual, iterations)


# The conditions K α + z + ν = (k = y), Σₖ α = 0, s z = μ, differentiated: (K + z/s) dα + dν = −dK α, Σₖ dα = 0. That
# map from right-hand sides to dα is symmetric, so that it is its own transpose. With W = αᵀX and dK = dX Xᵀ + X dXᵀ,
# dK α = dX Wᵀ + X (αᵀdX)ᵀ.
def _backward(ctx: Any, for_weights: Tensor, for_dual: Tensor, *_: Tensor) -> Arguments:
    support, labels, weights, dual, curvature, gram = ctx.saved_tensors
    right = for_dual + inner_products(support, for_weights, True)
    adjoint = _kkt_solve(right, gram, curvature, labels).to(support.dtype)
    along_dual = for_weights - combine_rows(adjoint.mT, support)
    coefficients = torch.cat([dual.to(support.dtype), -adjoint], 2)
    return combine_rows(coefficients, torch.cat([along_dual, weights], 1)), *[None] * 6


def _jvp(ctx: Any, along: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    support, labels, weights, dual, curvature, gram = ctx.saved_tensors
    held = combine_rows(dual.mT, along)
    right = inner_products(along, weights, True) + inner_products(support, held, True)
    along_dual = _kkt_solve(-right, gram, curvature, labels)
    return held + combine_rows(along_dual.mT, support), along_dual, None, None, None, None


def _kkt_fake(right: Tensor, gram: Tensor, curvature: Tensor, labels: Tensor) -> Tensor:
    return right.new_empty(right.shape)


def _refuse(*_: Any) -> NoReturn:
    raise RuntimeError(
        "the gradient of svm_head cannot be differentiated again (second-order meta-learning, a gradient penalty, a "
        "Hessian): use ridge_head, which is differentiable to any order"
    )


def _twin(
    support: Tensor, labels: Tensor, num_classes: int, C: float, _: int, __: float, diagonal: float
) -> tuple[Tensor | None, ...]:
    dual = reference.svm_dual(reference.svm_gram(support.double(), diagonal), labels, num_classes, C)
    return dual.mT.to(support.dtype) @ support, dual, None, None, None, None


_kkt_solve = differentiable(
    "svm_kkt_solve", fake=_kkt_fake, setup_context=lambda *_: None, backward=_refuse, jvp=_refuse
)
_weights = differentiable("svm_weights", fake=_fake, setup_context=_setup, backward=_backward, jvp=_jvp, twin=_twin)
