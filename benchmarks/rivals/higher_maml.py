"""higher's innerloop_ctx, used as its MAML example does."""

from __future__ import annotations

import higher
import torch

from innerloop.bench.rivals import Step
from innerloop.bench.rivals.torch_parts import body_and_learner, loss_function, tasks, training_model
from innerloop.bench.workloads import Workload


def cannot(workload: Workload) -> str | None:
    # With track_higher_grads=False it cuts the graph at the initial parameters, the body's gradient included.
    return "no first order" if workload.first_order else None


def make(workload: Workload, dtype: str) -> Step:
    model = training_model(workload, dtype)
    body, learner = body_and_learner(model, workload)
    inner_optimizer = torch.optim.SGD(learner.parameters(), lr=workload.inner_lr)
    loss_of = loss_function(workload)
    batch = tasks(workload, dtype)

    def step():
        model.zero_grad()
        total = 0.0
        for support_x, support_y, query_x, query_y in batch:
            with higher.innerloop_ctx(learner, inner_optimizer, copy_initial_weights=False) as (adapted, optimizer):
                support = body(support_x)
                for _ in range(workload.steps):
                    optimizer.step(loss_of(adapted(support), support_y))
                loss = loss_of(adapted(body(query_x)), query_y) / len(batch)
                loss.backward()
                total += loss.item()
        return total, [parameter.grad for parameter in model.parameters()]

    return step
