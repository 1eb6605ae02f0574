"""TorchOpt's MetaSGD, used as its few-shot example does: step, then put the initial parameters back."""

from __future__ import annotations

import torchopt

from innerloop.bench.rivals import Step
from innerloop.bench.rivals.torch_parts import body_and_learner, loss_function, tasks, training_model
from innerloop.bench.workloads import Workload


def cannot(workload: Workload) -> str | None:
    return "no first order" if workload.first_order else None


def make(workload: Workload, dtype: str) -> Step:
    model = training_model(workload, dtype)
    parameters = list(model.parameters())
    body, learner = body_and_learner(model, workload)
    optimizer = torchopt.MetaSGD(learner, lr=workload.inner_lr)
    initial_learner = torchopt.extract_state_dict(learner, by="reference")
    initial_optimizer = torchopt.extract_state_dict(optimizer, by="reference")
    loss_of = loss_function(workload)
    batch = tasks(workload, dtype)

    def step():
        for parameter in parameters:
            parameter.grad = None
        total = 0.0
        for support_x, support_y, query_x, query_y in batch:
            support = body(support_x)
            for _ in range(workload.steps):
                optimizer.step(loss_of(learner(support), support_y))
            loss = loss_of(learner(body(query_x)), query_y) / len(batch)
            loss.backward()
            total += loss.item()
            torchopt.recover_state_dict(learner, initial_learner)
            torchopt.recover_state_dict(optimizer, initial_optimizer)
        return total, [parameter.grad for parameter in parameters]

    return step
