"""learn2learn's MAML wrapper, used as its examples do: clone, adapt, backward through the clone."""

from __future__ import annotations

from rivals import Step
from rivals.importing import skip_umbrella
from rivals.torch_parts import body_and_learner, loss_function, tasks, training_model
from workloads import Workload

skip_umbrella("learn2learn", "learn2learn.algorithms")  # before its parts are imported, hence E402 below

from learn2learn.algorithms.maml import MAML  # noqa: E402


def make(workload: Workload, dtype: str) -> Step:
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
