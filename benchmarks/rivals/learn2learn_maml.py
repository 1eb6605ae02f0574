"""MAML by learn2learn's names, used as its examples do: clone, adapt, backward through the clone.

The names are learn2learn's own, or innerloop.compat's: the one import is all that differs.
"""

from __future__ import annotations

from importlib import import_module

from innerloop.bench.rivals import Step
from innerloop.bench.rivals.torch_parts import body_and_learner, loss_function, tasks, training_model
from innerloop.bench.workloads import Workload
from rivals.importing import skip_umbrella


def make(workload: Workload, dtype: str, package: str = "learn2learn") -> Step:
    if package == "learn2learn":
        skip_umbrella("learn2learn", "learn2learn.algorithms")
    MAML = import_module(f"{package}.algorithms.maml").MAML
    model = training_model(workload, dtype)
    body, learner = body_and_learner(model, workload)
    maml = MAML(learner, lr=workload.inner_lr, first_order=workload.first_order)
    loss_of = loss_function(workload)
    batch = tasks(workload, dtype)

    def step():
        model.zero_grad()
        total = 0.0
        for support_x, support_y, query_x, query_y in batch:
            clone = maml.clone()
            support = body(support_x)
            for _ in range(workload.steps):
                clone.adapt(loss_of(clone(support), support_y))
            loss = loss_of(clone(body(query_x)), query_y) / len(batch)
            loss.backward()
            total += loss.item()
        return total, [parameter.grad for parameter in model.parameters()]

    return step
