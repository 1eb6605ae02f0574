"""Ridge regression of the labels of each task's support set, and its scores of the queries."""

from __future__ import annotations

import torch
from torch import Tensor

from innerloop.ops._systems import combine_rows, gram_matrix, inner_products, solve_positive_definite
from innerloop.ops.checks import check_kernel, check_number, check_same_space, checked_labels, values_are_known


def ridge_head(
    support: Tensor,
    labels: Tensor,
    queries: Tensor,
    num_classes: int,
    *,
    regularization: float | Tensor = 1.0,
    mask: Tensor | None = None,
) -> Tensor:
    """X_q W with the W that minimises ‖X W − Y‖² + λ ‖W‖² over the support set: no bias, Y the one-hot labels
    (R2-D2, Bertinetto et al. 2019, equations 4 and 6).

    W = (XᵀX + λI)⁻¹ XᵀY = Xᵀ (XXᵀ + λI)⁻¹ Y, by the smaller of the two systems, [D, D] or [S, S]. The system and its
    solution are float64 for embeddings of either dtype. Differentiable to any order in support, queries,
    regularization and targets.

    Args:
        support: X, [T, S, D] float32 or float64.
        labels: [T, S] int64, 0 … num_classes-1 in any order; or the targets Y of a regression, [T, S, num_classes] in
            support's dtype.
        queries: X_q, [T, Q, D], support's dtype.
        num_classes: N.
        regularization: λ > 0, a number or a 0-d tensor (float32 or float64), which may require grad.
        mask: [T, S] bool, False where a support sample is padding and counts nowhere. None: all count.

    Returns: scores [T, Q, N] in support's dtype. R2-D2 scales and shifts them by learned numbers before the softmax.

    Raises:
        TypeError, ValueError: dtypes, shapes or devices that do not fit together, a label out of range, or a
            regularization that is not positive. Under torch.compile and under torch.func.vmap over labels no value can
            be looked at: there a label out of range is of no class.
        RuntimeError: the system of a task is not positive definite in float64, which the message names: its embeddings
            are not finite, or λ is below the rounding of their inner products.

    Examples:
        >>> support = torch.tensor([[[1.0, 0.0], [0.0, 3.0]]])
        >>> innerloop.ops.ridge_head(support, torch.tensor([[0, 1]]), queries=support, num_classes=2)
        tensor([[[0.5000, 0.0000],
                 [0.0000, 0.9000]]])
    """
    check_same_space(queries, support, "support", "[T, S, D]")
    check_kernel("gram_matrix", support, "support")
    rate = _regularization(regularization, support)
    targets = _targets(labels, support, num_classes, mask)
    if mask is not None:
        support = torch.where(mask[:, :, None], support, 0)
    if support.shape[1] <= support.shape[2]:
        coefficients = solve_positive_definite(_system(support, rate), targets.double())
        weights = combine_rows(coefficients.mT, support)
    else:
        features = support.mT
        products = inner_products(features, targets.mT, True)
        weights = solve_positive_definite(_system(features, rate), products).mT.to(support.dtype)
    scores: Tensor = inner_products(queries, weights, False)
    return scores


def _system(rows: Tensor, rate: Tensor) -> Tensor:
    return gram_matrix(rows) + rate * torch.eye(rows.shape[1], dtype=torch.float64, device=rows.device)


def _regularization(regularization: float | Tensor, support: Tensor) -> Tensor:
    if not isinstance(regularization, Tensor):
        check_number(regularization, "regularization")
        regularization = torch.tensor(float(regularization), dtype=torch.float64, device=support.device)
    if regularization.dim() != 0 or not regularization.is_floating_point():
        raise ValueError(
            f"regularization is {regularization.dtype} of shape {tuple(regularization.shape)}, "
            "expected a number or a 0-d floating-point tensor"
        )
    if values_are_known(regularization) and not regularization > 0:
        raise ValueError(f"regularization is {regularization.item()}, expected a positive number")
    return regularization.double()


def _targets(labels: Tensor, support: Tensor, num_classes: int, mask: Tensor | None) -> Tensor:
    """Y [T, S, N] in support's dtype, 0 where mask is False."""
    if isinstance(labels, Tensor) and labels.is_floating_point():
        if labels.dtype != support.dtype or labels.shape != (*support.shape[:2], num_classes):
            raise ValueError(
                f"labels is {labels.dtype} of shape {tuple(labels.shape)}; expected int64 of shape [T, S], or targets "
                f"[T, S, N] = {(*support.shape[:2], num_classes)} in support's {support.dtype}"
            )
        return labels if mask is None else torch.where(mask[:, :, None], labels, 0)
    labels = checked_labels(labels, "labels", support, "support", "[T, S]", num_classes, mask)
    return (labels[:, :, None] == torch.arange(num_classes, device=labels.device)).to(support.dtype)
