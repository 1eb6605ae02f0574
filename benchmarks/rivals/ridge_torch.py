"""Ridge regression in plain torch, all tasks at once, λ = 1: the smaller system, [S, S], in the embeddings' dtype."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F

from head_workloads import HeadWorkload
from innerloop.bench.rivals import Step
from rivals.head_parts import embeddings, step_of


def make(workload: HeadWorkload, dtype: str, solver: Literal["solve", "cholesky"]) -> Step:
    support, labels, queries, query_labels = embeddings(workload, dtype)
    targets = F.one_hot(labels, workload.ways).to(support.dtype)
    identity = torch.eye(support.shape[1], dtype=support.dtype)

    def loss_of():
        system = support @ support.mT + identity
        if solver == "cholesky":
            coefficients = torch.cholesky_solve(targets, torch.linalg.cholesky(system))
        else:
            coefficients = torch.linalg.solve(system, targets)
        scores = queries @ (support.mT @ coefficients)
        return F.cross_entropy(scores.flatten(0, 1), query_labels.flatten())

    return step_of(loss_of, support, queries)
