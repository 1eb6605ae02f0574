"""torchmeta's get_prototypes and prototypical_loss."""

from __future__ import annotations

from head_workloads import HeadWorkload
from innerloop.bench.rivals import Step
from rivals.head_parts import embeddings, step_of
from rivals.importing import skip_umbrella

skip_umbrella("torchmeta", "torchmeta.utils")  # before its parts are imported, hence E402 below

from torchmeta.utils.prototype import get_prototypes, prototypical_loss  # noqa: E402


def make(workload: HeadWorkload, dtype: str) -> Step:
    support, labels, queries, query_labels = embeddings(workload, dtype)
    return step_of(
        lambda: prototypical_loss(get_prototypes(support, labels, workload.ways), queries, query_labels),
        support,
        queries,
    )
