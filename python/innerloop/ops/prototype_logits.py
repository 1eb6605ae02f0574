"""Prototypical classification: the distances of queries to the class means of their task, and their cross-entropy."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from innerloop.ops.checks import check_same_space, checked_labels, values_are_known
from innerloop.ops.pairwise_distance import Metric, pairwise_distance
from innerloop.ops.prototypes import prototypes


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
    """
    check_same_space(queries, support, "support", "[T, S, D]")
    return -pairwise_distance(queries, prototypes(support, labels, num_classes, mask), metric, temperature)


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
        support, labels, queries, num_classes, temperature, mask: as there.
        query_labels: [T, Q] int64, 0 … num_classes-1.
        query_mask: [T, Q] bool, False where a query is padding and enters no loss. None: all enter.

    Returns: (losses [T], each the mean over the task's valid queries; the logits [T, Q, N], detached).

    Raises:
        TypeError, ValueError: as :func:`prototype_logits` does, and for query_labels out of range, or a task without a
            valid query.
    """
    check_same_space(queries, support, "support", "[T, S, D]")
    query_labels = checked_labels(
        query_labels, "query_labels", queries, "queries", "[T, Q]", num_classes, query_mask, "query_mask"
    )
    if query_mask is not None and values_are_known(query_mask):
        empty = (~query_mask.any(1)).nonzero()
        if len(empty):
            raise ValueError(f"query_mask leaves task {int(empty[0])} without a valid query")
    if query_mask is not None:
        queries = torch.where(query_mask[..., None], queries, 0)
    logits = prototype_logits(support, labels, queries, num_classes, temperature=temperature, mask=mask)
    losses = F.cross_entropy(logits.flatten(0, 1), query_labels.flatten(), ignore_index=-1, reduction="none")
    return losses.view_as(query_labels).sum(1) / (query_labels >= 0).sum(1), logits.detach()
