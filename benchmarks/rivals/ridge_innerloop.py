"""innerloop.ops.ridge_head, with λ = 1."""

from __future__ import annotations

import torch.nn.functional as F

from head_workloads import HeadWorkload
from innerloop import ops
from innerloop.bench.rivals import Step
from rivals.head_parts import embeddings, step_of


def make(workload: HeadWorkload, dtype: str) -> Step:
    support, labels, queries, query_labels = embeddings(workload, dtype)

    def loss_of():
        scores = ops.ridge_head(support, labels, queries, workload.ways)
        return F.cross_entropy(scores.flatten(0, 1), query_labels.flatten())

    return step_of(loss_of, support, queries)
