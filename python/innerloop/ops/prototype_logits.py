"""Prototypical classification: the distances of queries to the class means of their task, and their cross-entropy."""

from __future__ import annotations

from typing import Any, get_args

import torch
from torch import Tensor

import innerloop._library  # noqa: F401 (defines the ops)
from innerloop import reference
from innerloop.ops._differentiable import Arguments, differentiable, register_fake, transforms_active
from innerloop.ops.checks import (
    check_every_class,
    check_kernel,
    check_positive,
    check_same_space,
    checked_labels,
    values_are_known,
)
from innerloop.ops.pairwise_distance import Metric, derivative, pairwise_distance, squared_distances_backward
from innerloop.ops.prototypes import class_means, class_means_backward, prototypes
from innerloop.registry import check_choice


def prototype_logits(
    support: Tensor,
    labels: Tensor,
    queries: Tensor,
    num_classes: int,
    *,
    metric: Metric = "sqeuclidean",
    temperature: float = 1.0,
    mask: Tensor | None = None,
) -> Tensor:
    """Minus the distance of each query to the mean of each class, over the temperature (Snell et al. 2017, eq. 1-2).

    Differentiable in support and queries to any order.

    Args:
        support: [T, S, D] float32 or float64.
        labels: [T, S] int64, 0 … num_classes-1, in any order; classes may have different numbers of samples.
        queries: [T, Q, D], support's dtype.
        num_classes: N.
        metric, temperature: of :func:`pairwise_distance`.
        mask: [T, S] bool, False where a support sample is padding and counts nowhere. None: all count.

    Returns: [T, Q, N].

    Raises:
        TypeError, ValueError: as :func:`prototypes` and :func:`pairwise_distance` do.

    Examples:
        >>> support, queries = torch.tensor([[[0.0], [2.0], [5.0]]]), torch.tensor([[[1.0], [4.0]]])
        >>> innerloop.ops.prototype_logits(support, torch.tensor([[0, 0, 1]]), queries, num_classes=2)
        tensor([[[ -0., -16.],
                 [ -9.,  -1.]]])
    """
    check_same_space(queries, support, "support", "[T, S, D]")
    check_choice(metric, "metric", get_args(Metric))
    if metric != "sqeuclidean":
        return -pairwise_distance(queries, prototypes(support, labels, num_classes, mask), metric, temperature)
    labels = _checked_support_labels(support, labels, num_classes, temperature, mask)
    logits: Tensor = _logits(support, labels, queries, num_classes, temperature)[0]
    return logits


def prototype_loss(
    support: Tensor,
    labels: Tensor,
    queries: Tensor,
    query_labels: Tensor,
    num_classes: int,
    *,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    query_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The cross-entropy of :func:`prototype_logits` by squared Euclidean distance: a Prototypical Network's loss.

    The losses are differentiable in support and queries to any order.

    Args:
        support, labels, queries, num_classes, temperature, mask: of :func:`prototype_logits`.
        query_labels: [T, Q] int64, 0 … num_classes-1.
        query_mask: [T, Q] bool, False where a query is padding and enters no loss. None: all enter.

    Returns: (losses [T], each the mean over the task's valid queries; the logits [T, Q, N], detached).

    Raises:
        TypeError, ValueError: as :func:`prototype_logits` does, and for query_labels out of range, or a task without a
            valid query.

    Examples:
        >>> support, queries = torch.randn(8, 5, 64, requires_grad=True), torch.randn(8, 5, 64)
        >>> labels = torch.arange(5).expand(8, 5)
        >>> losses, logits = innerloop.ops.prototype_loss(support, labels, queries, labels, num_classes=5)
        >>> losses.shape, logits.shape
        (torch.Size([8]), torch.Size([8, 5, 5]))
        >>> losses.mean().backward()
    """
    check_same_space(queries, support, "support", "[T, S, D]")
    labels = _checked_support_labels(support, labels, num_classes, temperature, mask)
    query_labels = checked_labels(
        query_labels, "query_labels", queries, "queries", "[T, Q]", num_classes, query_mask, "query_mask"
    )
    if query_mask is not None:
        if values_are_known(query_mask):
            empty = (~query_mask.any(1)).nonzero()
            if len(empty):
                raise ValueError(f"query_mask leaves task {int(empty[0])} without a valid query")
        queries = torch.where(query_mask[..., None], queries, 0)
    losses, logits, *_ = _loss(support, labels, queries, query_labels, num_classes, temperature)
    return losses, logits


def _checked_support_labels(
    support: Tensor, labels: Tensor, num_classes: int, temperature: float, mask: Tensor | None
) -> Tensor:
    check_kernel("prototype_logits", support, "support")
    check_positive(temperature, "temperature")
    labels = checked_labels(labels, "labels", support, "support", "[T, S]", num_classes, mask)
    check_every_class(labels, "labels", num_classes)
    return labels


# The derivatives of −‖q − c‖²/τ, where c are the class means of s. First derivatives come from one native call;
# derivatives of derivatives, and those under torch.func, from the ops whose composition it is, which have their own.


def _gradients(
    gradient: Tensor, scale: Tensor | None, labels: Tensor, queries: Tensor, support: Tensor, num_classes: int,
    means: Tensor, weights: Tensor, temperature: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Those of support and queries, given that of the logits, gradient [T, Q, N], times scale [T]."""
    if not (torch.is_grad_enabled() or transforms_active()):
        return torch.ops.innerloop.prototype_logits_backward(
            gradient, scale, labels, queries, means, weights, temperature
        )
    if scale is not None:
        gradient = gradient * scale[:, None, None]
    means, _ = class_means(support, labels, num_classes)
    for_queries, for_means = squared_distances_backward(gradient / -temperature, queries, means)
    return class_means_backward(for_means, weights, labels), for_queries


def _logits_fake(
    support: Tensor, labels: Tensor, queries: Tensor, num_classes: int, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    tasks, count, dim = queries.shape
    return (
        queries.new_empty(tasks, count, num_classes),
        queries.new_empty(tasks, num_classes, dim),
        queries.new_empty(tasks, num_classes),
    )


def _logits_setup(ctx: Any, arguments: Arguments, output: tuple[Tensor, ...]) -> None:
    support, labels, queries, ctx.num_classes, ctx.temperature = arguments
    _, means, weights = output
    ctx.save_for_backward(support, labels, queries, means, weights)
    ctx.save_for_forward(support, labels, queries)
    ctx.mark_non_differentiable(means, weights)
    ctx.set_materialize_grads(False)


def _logits_backward(ctx: Any, gradient: Tensor | None, *_: Any) -> Arguments:
    if gradient is None:
        return (None,) * 5
    support, labels, queries, means, weights = ctx.saved_tensors
    for_support, for_queries = _gradients(
        gradient, None, labels, queries, support, ctx.num_classes, means, weights, ctx.temperature
    )
    return for_support, None, for_queries, None, None


def _logits_jvp(ctx: Any, along_support: Tensor | None, _: Any, along_queries: Tensor | None, *__: Any) -> Arguments:
    return _logits_along(ctx, along_support, along_queries), None, None


def _logits_along(ctx: Any, along_support: Tensor | None, along_queries: Tensor | None) -> Tensor:
    """The logits' change along (ṡ, q̇); None: 0."""
    support, labels, queries, *_ = ctx.saved_tensors
    means, _ = class_means(support, labels, ctx.num_classes)
    if along_support is None:
        along_means = torch.zeros_like(means)
    else:
        along_means, _ = class_means(along_support, labels, ctx.num_classes)
    if along_queries is None:
        along_queries = torch.zeros_like(queries)
    return derivative(queries, means, along_queries, along_means) / -ctx.temperature


def _logits_twin(
    support: Tensor, labels: Tensor, queries: Tensor, num_classes: int, temperature: float
) -> tuple[Tensor, None, None]:
    logits = reference.prototype_logits(support, labels, queries, num_classes, temperature=temperature)
    return logits, None, None


#: → (logits [T, Q, N], class means [T, N, D], 1 / number of samples of each class [T, N]), the latter for its backward.
_logits = differentiable(
    "prototype_logits",
    fake=_logits_fake,
    setup_context=_logits_setup,
    backward=_logits_backward,
    jvp=_logits_jvp,
    twin=_logits_twin,
)


def _loss_fake(
    support: Tensor, labels: Tensor, queries: Tensor, query_labels: Tensor, num_classes: int, temperature: float
) -> tuple[Tensor, ...]:
    logits, means, weights = _logits_fake(support, labels, queries, num_classes, temperature)
    return queries.new_empty(len(queries)), logits, torch.empty_like(logits), means, weights


def _loss_setup(ctx: Any, arguments: Arguments, output: tuple[Tensor, ...]) -> None:
    support, labels, queries, query_labels, ctx.num_classes, ctx.temperature = arguments
    ctx.save_for_backward(support, labels, queries, query_labels, *output[2:])
    ctx.save_for_forward(support, labels, queries, query_labels)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _loss_slope(support: Tensor, labels: Tensor, queries: Tensor, query_labels: Tensor, ctx: Any) -> Tensor:
    """The gradient of each task's loss for its logits, as a differentiable function of the embeddings."""
    logits, *_ = _logits(support, labels, queries, ctx.num_classes, ctx.temperature)
    chosen = query_labels[..., None] == torch.arange(ctx.num_classes, device=labels.device)
    valid = (query_labels >= 0).to(logits.dtype)
    return (logits.softmax(2) - chosen.to(logits.dtype)) * (valid / valid.sum(1, keepdim=True))[..., None]


def _loss_backward(ctx: Any, upstream: Tensor | None, *_: Any) -> Arguments:
    if upstream is None:
        return (None,) * 6
    support, labels, queries, query_labels, slope, means, weights = ctx.saved_tensors
    if torch.is_grad_enabled() or transforms_active():
        slope = _loss_slope(support, labels, queries, query_labels, ctx)
    for_support, for_queries = _gradients(
        slope, upstream, labels, queries, support, ctx.num_classes, means, weights, ctx.temperature
    )
    return for_support, None, for_queries, None, None, None


def _loss_jvp(ctx: Any, along_support: Tensor | None, _: Any, along_queries: Tensor | None, *__: Any) -> Arguments:
    support, labels, queries, query_labels = ctx.saved_tensors
    slope = _loss_slope(support, labels, queries, query_labels, ctx)
    return (slope * _logits_along(ctx, along_support, along_queries)).sum((1, 2)), None, None, None, None


def _loss_twin(
    support: Tensor, labels: Tensor, queries: Tensor, query_labels: Tensor, num_classes: int, temperature: float
) -> tuple[Tensor, ...]:
    return reference.prototype_loss(support, labels, queries, query_labels, num_classes, temperature=temperature)


#: → (losses [T], logits [T, Q, N], and for its backward: the losses' gradient for the logits, means, 1 / numbers).
_loss = differentiable(
    "prototype_loss",
    fake=_loss_fake,
    setup_context=_loss_setup,
    backward=_loss_backward,
    jvp=_loss_jvp,
    twin=_loss_twin,
)


def _gradients_fake(
    gradient: Tensor,
    scale: Tensor | None,
    labels: Tensor,
    queries: Tensor,
    means: Tensor,
    weights: Tensor,
    temperature: float,
) -> tuple[Tensor, Tensor]:
    return queries.new_empty(*labels.shape, queries.shape[2]), queries.new_empty(queries.shape)


def _refuse(ctx: Any, *_: Any) -> None:
    raise RuntimeError("innerloop::prototype_logits_backward has no derivative of its own: call innerloop.ops")


register_fake("prototype_logits_backward", _gradients_fake)
torch.library.register_autograd(
    "innerloop::prototype_logits_backward", _refuse, setup_context=lambda ctx, inputs, output: None
)
