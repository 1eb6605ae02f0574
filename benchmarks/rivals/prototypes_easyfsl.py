"""easyfsl's PrototypicalNetworks, one task after another. It ships the distance itself: here it is squared."""

from __future__ import annotations

import torch.nn.functional as F

from head_workloads import HeadWorkload
from innerloop.bench.rivals import Step
from rivals.head_parts import embeddings, mean_over_tasks, step_of
from rivals.importing import skip_umbrella

skip_umbrella("easyfsl", "easyfsl.methods")  # before its parts are imported, hence E402 below

from easyfsl.methods.prototypical_networks import PrototypicalNetworks  # noqa: E402


def make(workload: HeadWorkload, dtype: str) -> Step:
    support, labels, queries, query_labels = embeddings(workload, dtype)
    head = PrototypicalNetworks()

    def task_loss(support, labels, queries, query_labels):
        head.process_support_set(support, labels)
        return F.cross_entropy(-head(queries).square(), query_labels)

    return step_of(lambda: mean_over_tasks(task_loss, support, labels, queries, query_labels), support, queries)
