"""The specification of the recurrence, in plain torch: the meta-loss of a batch of tasks as an autograd graph.

This engine runs any module and any loss, is the oracle that every other engine is tested against, and the baseline of
the benchmarks. It loops over tasks and differentiates through the inner loop (``create_graph``), as Finn et al. 2017,
equation 1 with K steps, states it; nets of Linear layers alone run all tasks at once under ``torch.func.vmap``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import grad, vmap

from innerloop.contract import Result
from innerloop.functional import FunctionalModel
from innerloop.inner_loop import InnerLoop
from innerloop.losses import Loss, accuracy_per_task, check_targets, loss_per_task
from innerloop.tasks import TaskBatch

Parameters = Mapping[str, Tensor]

# Above this, on a CPU, batched products of per-task weights are slower than a loop of ordinary ones
# (benchmarks/results, 784-128-5: the loop; 1-40-40-1: vmap by 5x).
VMAP_MAX_PARAMETERS = 50_000


def meta_result(model: nn.Module, parameters: Parameters, tasks: TaskBatch, inner: InnerLoop) -> Result:
    """The meta-loss of a batch of tasks, differentiable (to any order) in parameters, rates and the tasks' inputs.

    Args:
        model: what runs; none of its parameters or buffers is written.
        parameters: θ₀ by the names of model.named_parameters(), of the parameter's shape where tasks share it, or
            [T, *shape] where each task has its own.
        tasks: T tasks. inner: the inner loop.

    Raises:
        ValueError: targets whose shape is not that of the outputs.
    """
    per_task = {name for name, parameter in model.named_parameters() if parameters[name].dim() == parameter.dim() + 1}
    if _suits_vmap(model, tasks, inner):
        total, logits = _vmap_tasks(model, parameters, per_task, tasks, inner)
    else:
        total, logits = _loop_over_tasks(model, parameters, per_task, tasks, inner)
    accuracies = accuracy_per_task(logits, tasks.query_y, tasks.query_mask) if tasks.is_classification else None
    return Result(total.mean(), total.detach(), logits, accuracies)


def adapt(model: nn.Module, parameters: Parameters, x: Tensor, y: Tensor, inner: InnerLoop) -> dict[str, Tensor]:
    """θ_K of one task with support set x [S, ...], y [S] or [S, *out]; detached.

    Parameters that are not adapted are returned as they came.
    """
    task = _Task(FunctionalModel(model, inner.bn), x, y, x, y)
    adapted = dict(parameters)
    with torch.enable_grad():
        for step in range(inner.steps):
            adapted = {name: value.detach() for name, value in adapted.items()}
            loss = task.support_loss(_require_grad(adapted, inner), inner.loss)
            adapted = _descend(task.parameters, loss, inner, step, create_graph=False)
    return {name: value.detach() for name, value in adapted.items()}


# --- the loop: one task at a time ---------------------------------------------------------------


@dataclass
class _Task:
    """One task and the model it runs through."""

    model: FunctionalModel
    support_x: Tensor
    support_y: Tensor
    query_x: Tensor
    query_y: Tensor

    def __post_init__(self) -> None:
        self.model.start_task()
        self.parameters: dict[str, Tensor] = {}

    def support_loss(self, parameters: Parameters, loss: Loss) -> Tensor:
        self.parameters = dict(parameters)
        outputs = self.model.support(parameters, self.support_x)
        return _loss(outputs, self.support_y, loss, "support_y")

    def query_outputs(self, parameters: Parameters) -> Tensor:
        return self.model.query(parameters, self.query_x)


def _loss(outputs: Tensor, targets: Tensor, loss: Loss, name: str) -> Tensor:
    check_targets(outputs[None], targets[None], name)
    return loss_per_task(outputs[None], targets[None], None, loss)[0]


def _loop_over_tasks(
    model: nn.Module, parameters: Parameters, per_task: set[str], tasks: TaskBatch, inner: InnerLoop
) -> tuple[Tensor, Tensor]:
    functional = FunctionalModel(model, inner.bn)
    totals, outputs = [], []
    for index in range(tasks.num_tasks):
        support_mask = None if tasks.support_mask is None else tasks.support_mask[index]
        query_mask = None if tasks.query_mask is None else tasks.query_mask[index]
        task = _Task(
            functional,
            _valid(tasks.support_x[index], support_mask),
            _valid(tasks.support_y[index], support_mask),
            _valid(tasks.query_x[index], query_mask),
            _valid(tasks.query_y[index], query_mask),
        )
        initial = {name: value[index] if name in per_task else value for name, value in parameters.items()}
        total, logits = _run_task(task, initial, inner)
        totals.append(total)
        if query_mask is not None:
            logits = logits.new_zeros(len(query_mask), *logits.shape[1:]).index_put((query_mask,), logits)
        outputs.append(logits)
    return torch.stack(totals), torch.stack(outputs)


def _valid(samples: Tensor, mask: Tensor | None) -> Tensor:
    return samples if mask is None else samples[mask]


def _run_task(task: _Task, initial: Parameters, inner: InnerLoop) -> tuple[Tensor, Tensor]:
    """(the task's meta-loss, its query outputs after the last step, detached)."""
    differentiable = torch.is_grad_enabled()
    parameters = dict(initial)
    total: Tensor | None = None

    def add(weight: float, loss: Tensor) -> None:
        nonlocal total
        total = weight * loss if total is None else total + weight * loss

    for step in range(inner.steps):
        with torch.enable_grad():  # the inner gradient is needed where no outer one is, too
            current = _require_grad(parameters if differentiable else _detach(parameters), inner)
            loss = task.support_loss(current, inner.loss)
            # The support loss at θ₀ is part of the meta-loss where u is not zero: its graph must outlive this step.
            keep = step == 0 and inner.support_weight != 0
            following = _descend(
                current, loss, inner, step, create_graph=differentiable and not inner.first_order, keep=keep
            )
        if keep:
            add(inner.support_weight, loss)
        if inner.step_weights[step] != 0:
            add(inner.step_weights[step], _loss(task.query_outputs(current), task.query_y, inner.loss, "query_y"))
        parameters = following
    if inner.steps == 0 and inner.support_weight != 0:
        add(inner.support_weight, task.support_loss(parameters, inner.loss))
    if task.model.reads_support_statistics:
        task.model.support(parameters, task.support_x)
    with torch.set_grad_enabled(differentiable and inner.step_weights[-1] != 0):
        outputs = task.query_outputs(parameters)
        if inner.step_weights[-1] != 0 or total is None:
            add(inner.step_weights[-1], _loss(outputs, task.query_y, inner.loss, "query_y"))
    assert total is not None
    return total if differentiable else total.detach(), outputs.detach()


def _detach(parameters: Parameters) -> dict[str, Tensor]:
    return {name: value.detach() for name, value in parameters.items()}


def _require_grad(parameters: Parameters, inner: InnerLoop) -> dict[str, Tensor]:
    """The parameters with the adapted ones part of a graph; one that is frozen for the outer loop gets a leaf here."""
    return {
        name: value.detach().requires_grad_() if name in inner.rates and not value.requires_grad else value
        for name, value in parameters.items()
    }


def _descend(
    parameters: Parameters, loss: Tensor, inner: InnerLoop, step: int, create_graph: bool, keep: bool = False
) -> dict[str, Tensor]:
    """θₖ₊₁ = θₖ − αₖ ⊙ ∇L_support(θₖ)."""
    following = dict(parameters)
    adapted = list(inner.rates)
    if not adapted:
        return following
    gradients = torch.autograd.grad(
        loss,
        [parameters[name] for name in adapted],
        create_graph=create_graph,
        retain_graph=create_graph or keep,
        allow_unused=True,
    )
    for name, gradient in zip(adapted, gradients, strict=True):
        if gradient is not None:
            following[name] = parameters[name] - inner.rates[name].at(step) * gradient
    return following


# --- all tasks at once, for small nets ----------------------------------------------------------


def _suits_vmap(model: nn.Module, tasks: TaskBatch, inner: InnerLoop) -> bool:
    """Whether torch.func.vmap is exact here, and faster than the loop: nets of Linear layers and plain activations."""
    if tasks.num_tasks < 2 or callable(inner.loss) or tasks.support_mask is not None or tasks.query_mask is not None:
        return False
    plain = (nn.Linear, nn.ReLU, nn.LeakyReLU, nn.Tanh, nn.Sigmoid, nn.GELU, nn.Flatten, nn.Identity, nn.Sequential)
    children = [module for module in model.modules() if module is not model]
    if not all(isinstance(module, plain) for module in children) or list(model.parameters(recurse=False)):
        return isinstance(model, nn.Linear) and not children
    return sum(parameter.numel() for parameter in model.parameters()) <= VMAP_MAX_PARAMETERS


def _vmap_tasks(
    model: nn.Module, parameters: Parameters, per_task: set[str], tasks: TaskBatch, inner: InnerLoop
) -> tuple[Tensor, Tensor]:
    functional = FunctionalModel(model, inner.bn, elementary=True)
    functional.start_task()
    axes = {name: 0 if name in per_task else None for name in parameters}

    def support_loss(adapted: Parameters, fixed: Parameters, x: Tensor, y: Tensor) -> Tensor:
        return _loss(functional.support({**fixed, **adapted}, x), y, inner.loss, "support_y")

    def query_loss(parameters: Parameters, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        outputs = functional.query(parameters, x)
        return _loss(outputs, y, inner.loss, "query_y"), outputs

    def task(
        initial: Parameters, support_x: Tensor, support_y: Tensor, query_x: Tensor, query_y: Tensor
    ) -> tuple[Tensor, Tensor]:
        current = dict(initial)
        total = torch.zeros((), dtype=query_x.dtype, device=query_x.device)
        if inner.support_weight != 0:
            total = total + inner.support_weight * support_loss({}, current, support_x, support_y)
        for step in range(inner.steps):
            if inner.step_weights[step] != 0:
                total = total + inner.step_weights[step] * query_loss(current, query_x, query_y)[0]
            adapted = {name: current[name] for name in inner.rates}
            gradients = grad(support_loss)(adapted, current, support_x, support_y)
            for name, gradient in gradients.items():
                gradient = gradient.detach() if inner.first_order else gradient
                current[name] = current[name] - inner.rates[name].at(step) * gradient
        loss, outputs = query_loss(current, query_x, query_y)
        return total + inner.step_weights[-1] * loss, outputs

    total, outputs = vmap(task, in_dims=(axes, 0, 0, 0, 0))(
        dict(parameters), tasks.support_x, tasks.support_y, tasks.query_x, tasks.query_y
    )
    return total, outputs.detach()
