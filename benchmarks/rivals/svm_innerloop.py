"""innerloop.ops.svm_head, or its plain-torch twin; with the diagonal of 1 that MetaOptNet's code has."""

from __future__ import annotations

import torch.nn.functional as F

from head_workloads import HeadWorkload
from innerloop import ops, reference
from innerloop.bench.rivals import Step
from rivals.head_parts import embeddings, step_of


def make(workload: HeadWorkload, dtype: str, *, native: bool) -> Step:
    support, labels, queries, query_labels = embeddings(workload, dtype)
    head = ops.svm_head if native else reference.svm_head

    def loss_of():
        scores = head(support, labels, queries, workload.ways, C=0.1, diagonal=1.0)
        return F.cross_entropy(scores.flatten(0, 1), query_labels.flatten())

    return step_of(loss_of, support, queries)
