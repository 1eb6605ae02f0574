"""innerloop.ops.prototype_loss."""

from __future__ import annotations

from head_workloads import HeadWorkload
from innerloop import ops
from innerloop.bench.rivals import Step
from rivals.head_parts import embeddings, step_of


def make(workload: HeadWorkload, dtype: str) -> Step:
    support, labels, queries, query_labels = embeddings(workload, dtype)
    return step_of(
        lambda: ops.prototype_loss(support, labels, queries, query_labels, workload.ways)[0].mean(), support, queries
    )
