"""All tasks at once: torch.func.grad inside torch.func.vmap, as it is, or compiled by torch.compile."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.func import functional_call, grad, grad_and_value, vmap

from innerloop.bench.rivals import LossAndGradients, Step
from innerloop.bench.rivals.torch_parts import (
    batch,
    body_and_learner,
    loss_function,
    training_model,
    with_exact_batch_norm,
)
from innerloop.bench.workloads import Workload, has_batch_norm

Parameters = dict[str, Tensor]


def cannot(workload: Workload, exact_batch_norm: bool = False, compiled: bool = False) -> str | None:
    if exact_batch_norm and not compiled and not has_batch_norm(workload):
        return "has no BatchNorm"
    return None


def make(workload: Workload, dtype: str, exact_batch_norm: bool = False, compiled: bool = False) -> Step:
    model = training_model(workload, dtype).requires_grad_(False)
    if exact_batch_norm:
        model = with_exact_batch_norm(model)
    body, learner = body_and_learner(model, workload)
    loss_of = loss_function(workload)
    data = batch(workload, dtype)
    parameters = dict(model.named_parameters())
    body_parameters: Parameters = dict(body.named_parameters())
    initial: Parameters = dict(learner.named_parameters())

    def support_loss(adapted: Parameters, support: Tensor, support_y: Tensor) -> Tensor:
        return loss_of(functional_call(learner, adapted, (support,)), support_y)

    def task_loss(
        shared: Parameters, initial: Parameters, support_x: Tensor, support_y: Tensor, query_x: Tensor, query_y: Tensor
    ) -> Tensor:
        adapted = initial
        support = functional_call(body, shared, (support_x,))
        for _ in range(workload.steps):
            gradients = grad(support_loss)(adapted, support, support_y)
            if workload.first_order:
                gradients = {name: gradient.detach() for name, gradient in gradients.items()}
            adapted = {name: adapted[name] - workload.inner_lr * gradients[name] for name in adapted}
        return loss_of(functional_call(learner, adapted, (functional_call(body, shared, (query_x,)),)), query_y)

    def meta_loss(shared: Parameters, initial: Parameters, *data: Tensor) -> Tensor:
        return vmap(task_loss, (None, None, 0, 0, 0, 0))(shared, initial, *data).mean()

    meta_gradient = grad_and_value(meta_loss, argnums=(0, 1))
    if compiled:
        meta_gradient = torch.compile(meta_gradient, fullgraph=True)

    def step() -> LossAndGradients:
        (of_body, of_learner), loss = meta_gradient(body_parameters, initial, *data)
        gradients = [*of_body.values(), *of_learner.values()]
        assert len(gradients) == len(parameters)
        return loss, gradients

    return step
