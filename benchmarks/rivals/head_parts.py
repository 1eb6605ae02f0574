"""What the heads written in torch share: the embeddings, and a step."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from head_workloads import HeadWorkload, make_embeddings
from innerloop.bench.rivals import Step


def embeddings(workload: HeadWorkload, dtype: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """support, labels, queries, their labels; the embeddings want a gradient."""
    support, labels, queries, query_labels = map(torch.from_numpy, make_embeddings(workload, dtype))
    return support.requires_grad_(), labels, queries.requires_grad_(), query_labels


def step_of(loss_of: Callable[[], Tensor], support: Tensor, queries: Tensor) -> Step:
    def step():
        support.grad = queries.grad = None
        loss = loss_of()
        loss.backward()
        return loss.detach(), [support.grad, queries.grad]

    return step


def mean_over_tasks(loss_of: Callable[..., Tensor], *batch: Tensor) -> Tensor:
    """Of a head that knows one task: loss_of each task's part of batch."""
    return torch.stack([loss_of(*task) for task in zip(*batch, strict=True)]).mean()
