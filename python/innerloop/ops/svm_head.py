"""The support vector machine of each task's support set, differentiable through its optimality conditions."""

from __future__ import annotations

from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

import innerloop._library  # noqa: F401 (defines the ops)
from innerloop import reference
from innerloop.ops._differentiable import Arguments, differentiable
from innerloop.ops._systems import combine_rows, gram_matrix, inner_products
from innerloop.ops.checks import check_dims, check_float, check_kernel, check_same_space, checked_labels


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
    scores: Tensor = inner_products(queries, solution.weights).to(support.dtype)
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
        max_iterations, tolerance: it has converged when the duality gap is at most tolerance times the primal
            objective, or when no more is left of the gap than float64's rounding.
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
        if not number > 0:
            raise ValueError(f"{name} is {number}, expected a positive number")
    if not diagonal >= 0:
        raise ValueError(f"diagonal is {diagonal}, expected at least 0")
    labels = checked_labels(labels, "labels", support, "support", "[T, S]", num_classes, mask)
    if mask is not None:
        support = torch.where(mask[:, :, None], support, 0)
    gram = gram_matrix(support)
    if diagonal:
        gram = gram + diagonal * torch.eye(support.shape[1], dtype=torch.float64, device=support.device)
    dual, _, residual, iterations = _solve(gram, labels, num_classes, C, max_iterations, tolerance)
    return SvmSolution(combine_rows(dual.mT, support), dual, residual, iterations)


def _fake(
    gram: Tensor, labels: Tensor, num_classes: int, C: float, max_iterations: int, tolerance: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dual = gram.new_empty(*labels.shape, num_classes)
    return dual, torch.empty_like(dual), gram.new_empty(len(gram)), labels.new_empty(len(gram))


def _setup(ctx: Any, arguments: Arguments, output: tuple[Tensor, ...]) -> None:
    gram, labels = arguments[:2]
    dual, curvature, residual, iterations = output
    ctx.save_for_backward(gram, labels, dual, curvature)
    ctx.save_for_forward(gram, labels, dual, curvature)
    ctx.mark_non_differentiable(curvature, residual, iterations)


# The conditions K α + z + ν = (k = y), Σₖ α = 0, s z = μ, differentiated: (K + z/s) dα + dν = −dK α, Σₖ dα = 0. That
# map from right-hand sides to dα is symmetric, so that it is its own transpose.
def _backward(ctx: Any, for_dual: Tensor, *_: Tensor) -> Arguments:
    gram, labels, dual, curvature = ctx.saved_tensors
    adjoint = _kkt_solve(for_dual, gram, curvature, labels)
    return -(adjoint @ dual.mT), *[None] * 5


def _jvp(ctx: Any, along_gram: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    gram, labels, dual, curvature = ctx.saved_tensors
    return _kkt_solve(-(along_gram @ dual), gram, curvature, labels), None, None, None


def _kkt_fake(right: Tensor, gram: Tensor, curvature: Tensor, labels: Tensor) -> Tensor:
    return right.new_empty(right.shape)


def _refuse(*_: Any) -> NoReturn:
    raise RuntimeError(
        "the gradient of svm_head cannot be differentiated again (second-order meta-learning, a gradient penalty, a "
        "Hessian): use ridge_head, which is differentiable to any order"
    )


def _twin(gram: Tensor, labels: Tensor, num_classes: int, C: float, *_: float) -> tuple[Tensor, None, None, None]:
    return reference.svm_dual(gram, labels, num_classes, C), None, None, None


_kkt_solve = differentiable(
    "svm_kkt_solve", fake=_kkt_fake, setup_context=lambda *_: None, backward=_refuse, jvp=_refuse
)
_solve = differentiable("svm_solve", fake=_fake, setup_context=_setup, backward=_backward, jvp=_jvp, twin=_twin)
