"""Plain-torch twins of the native ops: their specification, and the oracle of their tests."""

from __future__ import annotations

import torch
from torch import Tensor


def prototypes(embeddings: Tensor, labels: Tensor, num_classes: int, mask: Tensor | None = None) -> Tensor:
    """Twin of :func:`innerloop.ops.prototypes`."""
    members = labels[:, None] == torch.arange(num_classes, device=labels.device)[:, None]  # [T, N, S]
    if mask is not None:
        members = members & mask[:, None]
    members = members.to(embeddings.dtype)
    return members @ embeddings / members.sum(2, keepdim=True)


def pairwise_distance(
    queries: Tensor, prototypes: Tensor, metric: str = "sqeuclidean", temperature: float = 1.0
) -> Tensor:
    """Twin of :func:`innerloop.ops.pairwise_distance`; makes the [T, Q, N, D] tensor. Knows no identical points with
    "euclidean", and no zero vectors with "cosine"."""
    q, p = queries[:, :, None], prototypes[:, None]
    if metric == "sqeuclidean":
        distances = ((q - p) ** 2).sum(3)
    elif metric == "euclidean":
        distances = ((q - p) ** 2).sum(3).sqrt()
    elif metric == "cosine":
        distances = 1 - _cosine(q, p)
    else:
        distances = -(q * p).sum(3)
    return distances / temperature


def _cosine(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(3) / (a.norm(dim=3) * b.norm(dim=3))


def prototype_logits(
    support: Tensor,
    labels: Tensor,
    queries: Tensor,
    num_classes: int,
    *,
    metric: str = "sqeuclidean",
    temperature: float = 1.0,
    mask: Tensor | None = None,
) -> Tensor:
    """Twin of :func:`innerloop.ops.prototype_logits`."""
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
    """Twin of :func:`innerloop.ops.prototype_loss`."""
    logits = prototype_logits(support, labels, queries, num_classes, temperature=temperature, mask=mask)
    valid = query_labels >= 0 if query_mask is None else query_mask
    chosen = query_labels[..., None] == torch.arange(num_classes, device=labels.device)
    losses = -(logits.log_softmax(2) * chosen).sum(2)
    return (losses * valid).sum(1) / valid.sum(1), logits.detach()


def attention_classify(
    queries: Tensor,
    support: Tensor,
    labels: Tensor,
    num_classes: int,
    *,
    temperature: float = 1.0,
    mask: Tensor | None = None,
) -> Tensor:
    """Twin of :func:`innerloop.ops.attention_classify`; makes the [T, Q, S, D] tensor, and takes a logarithm of what
    may have been rounded to 0. Knows no zero vectors."""
    similarity = _cosine(queries[:, :, None], support[:, None]) / temperature
    if mask is not None:
        similarity = similarity.masked_fill(~mask[:, None], -torch.inf)
    members = labels[..., None] == torch.arange(num_classes, device=labels.device)  # [T, S, N]
    return (similarity.softmax(2) @ members.to(queries.dtype)).log()


def inner_update(params: list[Tensor], grads: list[Tensor], lr: list[Tensor]) -> list[Tensor]:
    """Twin of :func:`innerloop.ops.inner_update`."""
    return [param - rate * grad for param, grad, rate in zip(params, grads, lr, strict=True)]
