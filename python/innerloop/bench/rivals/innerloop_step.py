"""innerloop.maml_loss and .backward(), with a ready TaskBatch: what a user's iteration costs."""

from __future__ import annotations

from typing import Any, Literal

from torch import nn

from innerloop import TaskBatch, maml_loss
from innerloop.bench.rivals import LossAndGradients, Step
from innerloop.bench.rivals.torch_parts import batch
from innerloop.bench.workloads import Workload, adapted_parameters, make_model


def inner_loop_of(workload: Workload, model: nn.Module) -> dict[str, Any]:
    """The arguments of maml_loss."""
    return {
        "inner_lr": workload.inner_lr,
        "inner_steps": workload.steps,
        "adapt": adapted_parameters(workload, model),
        "first_order": workload.first_order,
        "loss": workload.loss,
    }


def make(workload: Workload, dtype: str, engine: Literal["native", "torch"]) -> Step:
    model = make_model(workload, dtype)
    parameters = list(model.parameters())
    tasks = TaskBatch(*batch(workload, dtype))
    inner_loop = inner_loop_of(workload, model)

    def step() -> LossAndGradients:
        for parameter in parameters:
            parameter.grad = None
        loss = maml_loss(model, tasks, **inner_loop, engine=engine)
        loss.backward()
        return loss.detach(), [parameter.grad for parameter in parameters]

    return step
