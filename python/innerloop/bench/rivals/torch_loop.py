"""The loop that people write themselves: torch.autograd.grad with create_graph through every task's inner loop."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.func import functional_call

from innerloop.bench.rivals import LossAndGradients, Step
from innerloop.bench.rivals.torch_parts import body_and_learner, loss_function, tasks, training_model
from innerloop.bench.workloads import Workload


def make(workload: Workload, dtype: str) -> Step:
    model = training_model(workload, dtype)
    body, learner = body_and_learner(model, workload)
    initial: dict[str, Tensor] = dict(learner.named_parameters())
    loss_of = loss_function(workload)
    batch = tasks(workload, dtype)

    def step() -> LossAndGradients:
        model.zero_grad()
        total = 0.0
        for support_x, support_y, query_x, query_y in batch:
            parameters = initial
            support = body(support_x)
            for _ in range(workload.steps):
                loss = loss_of(functional_call(learner, parameters, (support,)), support_y)
                gradients = torch.autograd.grad(
                    loss, tuple(parameters.values()), create_graph=not workload.first_order, retain_graph=True
                )
                parameters = {
                    name: value - workload.inner_lr * gradient
                    for (name, value), gradient in zip(parameters.items(), gradients, strict=True)
                }
            loss = loss_of(functional_call(learner, parameters, (body(query_x),)), query_y) / len(batch)
            loss.backward()
            total += loss.item()
        return total, [parameter.grad for parameter in model.parameters()]

    return step
