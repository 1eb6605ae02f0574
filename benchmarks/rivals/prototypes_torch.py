"""Prototypes and their distances in plain torch, all tasks at once, for classes of one size in one order."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F

from head_workloads import HeadWorkload
from innerloop import reference
from innerloop.bench.rivals import Step
from rivals.head_parts import embeddings, step_of

Form = Literal["reference", "expanded", "no_norms", "cdist"]


def make(workload: HeadWorkload, dtype: str, form: Form) -> Step:
    support, labels, queries, query_labels = embeddings(workload, dtype)

    def loss_of():
        if form == "reference":
            return reference.prototype_loss(support, labels, queries, query_labels, workload.ways)[0].mean()
        centres = support.unflatten(1, (workload.shots, workload.ways)).mean(1)
        if form == "cdist":
            logits = -torch.cdist(queries, centres).square()
        else:
            logits = torch.baddbmm(-centres.square().sum(2)[:, None], queries, centres.mT, alpha=2)
            if form == "expanded":
                logits = logits - queries.square().sum(2, keepdim=True)
        return F.cross_entropy(logits.flatten(0, 1), query_labels.flatten())

    return step_of(loss_of, support, queries)
