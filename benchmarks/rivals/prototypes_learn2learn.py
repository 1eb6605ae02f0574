"""learn2learn's PrototypicalClassifier, one task after another."""

from __future__ import annotations

import torch.nn.functional as F

from head_workloads import HeadWorkload
from innerloop.bench.rivals import Step
from rivals.head_parts import embeddings, mean_over_tasks, step_of
from rivals.importing import skip_umbrella

skip_umbrella("learn2learn", "learn2learn.nn")  # before its parts are imported, hence E402 below

from learn2learn.nn.protonet import PrototypicalClassifier  # noqa: E402


def make(workload: HeadWorkload, dtype: str) -> Step:
    support, labels, queries, query_labels = embeddings(workload, dtype)

    def task_loss(support, labels, queries, query_labels):
        return F.cross_entropy(PrototypicalClassifier(support, labels)(queries), query_labels)

    return step_of(lambda: mean_over_tasks(task_loss, support, labels, queries, query_labels), support, queries)
