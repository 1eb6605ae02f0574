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


def pairwise_distance(queries: Tensor, prototypes: Tensor, metric: str = "sqeuclidean") -> Tensor:
    """Twin of :func:`innerloop.ops.pairwise_distance`; makes the [T, Q, N, D] tensor."""
    q, p = queries[:, :, None], prototypes[:, None]
    if metric == "sqeuclidean":
        return ((q - p) ** 2).sum(3)
    if metric == "cosine":
        return 1 - (q * p).sum(3) / (q.norm(dim=3) * p.norm(dim=3))
    return -(q * p).sum(3)


def inner_update(params: list[Tensor], grads: list[Tensor], lr: list[Tensor]) -> list[Tensor]:
    """Twin of :func:`innerloop.ops.inner_update`."""
    return [param - rate * grad for param, grad, rate in zip(params, grads, lr, strict=True)]
