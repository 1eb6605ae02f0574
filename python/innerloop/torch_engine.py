"""The specification of the recurrence, in plain torch: the meta-loss of a batch of tasks as an autograd graph.

This engine runs any module and any loss, is the oracle that every other engine is tested against, and the baseline of
the benchmarks. It loops over tasks and differentiates through the inner loop (``create_graph``), as Finn et al. 2017,
equation 1 with K steps, states it; nets of Linear layers alone run all tasks at once under ``torch.func.vmap``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import grad, vmap

from innerloop.contract import Result
from innerloop.functional import FunctionalModel
from innerloop.inner_loop import InnerLoop
from innerloop.inner_optimizers import Directions
from innerloop.losses import Loss, accuracy_per_task, check_targets, loss_per_task
from innerloop.ops._differentiable import transforms_active
from innerloop.tasks import TaskBatch

Parameters = Mapping[str, Tensor]

# Above this, on a CPU, batched products of per-task weights are no faster than a loop of ordinary ones: 25 tasks,
# forward and backward, one thread, loop / vmap in ms: 1-40-40-1 15.5 / 2.5, 160-160-160-5 25.7 / 11.4,
# 784-64-5 19.7 / 15.2, 784-128-5 26.3 / 28.5.
VMAP_MAX_PARAMETERS = 100_000


def meta_result(model: nn.Module, parameters: Parameters, tasks: TaskBatch, inner: InnerLoop) -> Result:
    """The meta-loss of a batch of tasks, differentiable (to any order) in parameters, rates and the tasks' inputs.

    Args:
        model: what runs; none of its parameters or buffers is written.
        parameters: θ₀ by the names of model.named_parameters(), of the parameter's shape where tasks share it, or
            [T, *shape] where each task has its own.
        tasks: T tasks. inner: the inner loop.

    Raises:
        ValueError: parameters or targets that do not fit the model; a head whose outputs are not the tasks' ways; a
            torch.func transform or forward mode around the loop over tasks.
    """
    per_task = per_task_parameters(model, parameters, tasks.num_tasks)
    if _suits_vmap(model, tasks, inner):
        total, logits = _vmap_tasks(model, parameters, per_task, tasks, inner)
    else:
        total, logits = _loop_over_tasks(model, parameters, per_task, tasks, inner)
    accuracies = accuracy_per_task(logits, tasks.query_y, tasks.query_mask) if tasks.is_classification else None
    return Result(total.mean(), total.detach(), logits, accuracies)


def adapt_tasks(
    model: nn.Module, parameters: Parameters, tasks: TaskBatch, inner: InnerLoop, proximal: float = 0.0
) -> dict[str, Tensor]:
    """θ_K of every task for the parameters that are adapted, [T, *shape]; detached.

    The arguments are those of :func:`meta_result`; proximal is λ of a descent along the gradient plus λ(θₖ − θ₀).
    """
    found = []
    with torch.enable_grad():
        for initial, support_loss in _support_losses(model, parameters, tasks, inner):
            adapted = initial
            directions = Directions(inner.optimizer)
            for step in range(inner.steps):
                current = _independent(_detach(adapted), inner)
                adapted = _descend(current, support_loss(current, step), inner, step, directions, create_graph=False)
                for name, rate in inner.rates.items() if proximal != 0 else ():
                    away = current[name] - initial[name]
                    adapted[name] = adapted[name] - rate.at(step) * proximal * away
            found.append(_detach(adapted))
    return {name: torch.stack([adapted[name] for adapted in found]) for name in inner.rates}


def hessian_vector_products(
    model: nn.Module, parameters: Parameters, tasks: TaskBatch, vectors: Parameters, inner: InnerLoop
) -> dict[str, Tensor]:
    """The Hessian of every task's support loss at its parameters, of those that have a vector, times it; detached.

    The arguments are those of :func:`meta_result`.

    Args:
        vectors: by name, [T, *shape]. inner: its loss, its bn, and as what it adapts the names of vectors.

    Returns: [T, *shape] by name.
    """
    found: dict[str, list[Tensor]] = {name: [] for name in vectors}
    losses = _support_losses(model, parameters, tasks, inner, second_order=True)
    with torch.enable_grad():
        for index, (initial, support_loss) in enumerate(losses):
            current = _independent(initial, inner)
            variables = [current[name] for name in vectors]
            loss = support_loss(current, 0)
            gradients = _gradients([loss], variables, create_graph=True)
            products = _gradients(gradients, variables, [vector[index] for vector in vectors.values()])
            for name, product in zip(vectors, products, strict=True):
                found[name].append(product.detach())
    return {name: torch.stack(products) for name, products in found.items()}


def _gradients(
    of: Sequence[Tensor],
    variables: Sequence[Tensor],
    weights: Sequence[Tensor] | None = None,
    create_graph: bool = False,
) -> list[Tensor]:
    """The gradient of the sum of tensors, times weights; zero where they do not depend on a variable."""
    chosen = [place for place, tensor in enumerate(of) if tensor.requires_grad]
    found: Sequence[Tensor | None] = [None] * len(variables)
    if chosen:
        outputs = [of[place] for place in chosen]
        given = None if weights is None else [weights[place] for place in chosen]
        found = torch.autograd.grad(outputs, variables, given, create_graph=create_graph, allow_unused=True)
    return [
        torch.zeros_like(variable) if gradient is None else gradient
        for variable, gradient in zip(variables, found, strict=True)
    ]


def _support_losses(
    model: nn.Module, parameters: Parameters, tasks: TaskBatch, inner: InnerLoop, second_order: bool = False
) -> Iterator[tuple[dict[str, Tensor], Callable[[Parameters, int], Tensor]]]:
    """For each task its θ₀, detached, and its support loss as a function of the parameters and the steps to them."""
    per_task = per_task_parameters(model, parameters, tasks.num_tasks)
    functional = FunctionalModel(model, inner.bn, second_order=second_order)
    for index in range(tasks.num_tasks):
        functional.start_task()
        mask = None if tasks.support_mask is None else tasks.support_mask[index]
        x, y = _valid(tasks.support_x[index], mask).detach(), _valid(tasks.support_y[index], mask).detach()
        initial = {name: value[index] if name in per_task else value for name, value in parameters.items()}

        def support_loss(theta: Parameters, steps: int, x: Tensor = x, y: Tensor = y) -> Tensor:
            return _loss(functional.support(theta, x, steps), y, inner.loss, "support_y")

        yield _detach(initial), support_loss


def per_task_parameters(model: nn.Module, parameters: Parameters, tasks: int) -> set[str]:
    """The parameters of which every task has its own."""
    per_task = set()
    for name, parameter in model.named_parameters():
        if name not in parameters:
            raise ValueError(f"parameters lacks {name!r}, which the model has")
        shape = tuple(parameters[name].shape)
        if shape == (tasks, *parameter.shape):
            per_task.add(name)
        elif shape != tuple(parameter.shape):
            raise ValueError(
                f"parameters[{name!r}] has shape {shape}, expected {tuple(parameter.shape)}, "
                f"or {(tasks, *parameter.shape)} with one for each task"
            )
    return per_task


# --- the loop: one task at a time ---------------------------------------------------------------


@dataclass
class _Task:
    """One task, its padding left out, and the model it runs through."""

    model: FunctionalModel
    support_x: Tensor
    support_y: Tensor
    query_x: Tensor
    query_y: Tensor
    ways: int | None

    def support_loss(self, parameters: Parameters, loss: Loss, steps: int) -> Tensor:
        outputs = self.model.support(parameters, self.support_x, steps)
        return _loss(outputs, self.support_y, loss, "support_y", self.ways)

    def query_outputs(self, parameters: Parameters, steps: int) -> Tensor:
        return self.model.query(parameters, self.query_x, steps)

    def query_loss(self, outputs: Tensor, loss: Loss) -> Tensor:
        return _loss(outputs, self.query_y, loss, "query_y", self.ways)


def _loss(outputs: Tensor, targets: Tensor, loss: Loss, name: str, ways: int | None = None) -> Tensor:
    if ways is not None and outputs.dim() > 1 and outputs.shape[1] != ways:
        raise ValueError(f"tasks has {ways} ways, but the model's head has {outputs.shape[1]} outputs: make them equal")
    check_targets(outputs[None], targets[None], name)
    return loss_per_task(outputs[None], targets[None], None, loss)[0]


def _loop_over_tasks(
    model: nn.Module, parameters: Parameters, per_task: set[str], tasks: TaskBatch, inner: InnerLoop
) -> tuple[Tensor, Tensor]:
    differentiable = torch.is_grad_enabled()
    if transforms_active() and (inner.steps > 0 or not differentiable):
        # autograd.grad, which makes the inner steps, is no part of torch.func's, and drops forward mode's derivatives.
        raise ValueError(
            "a torch.func transform or forward-mode differentiation is active, and the inner loop of this model, a "
            "loop over tasks, has derivatives by backward() and torch.autograd.grad alone"
        )
    second_order = differentiable and inner.steps > 0 and not inner.first_order
    functional = FunctionalModel(model, inner.bn, second_order=second_order, collecting=inner.collecting)
    totals, outputs = [], []
    for index in range(tasks.num_tasks):
        support_mask = None if tasks.support_mask is None else tasks.support_mask[index]
        query_mask = None if tasks.query_mask is None else tasks.query_mask[index]
        functional.start_task()
        task = _Task(
            functional,
            _valid(tasks.support_x[index], support_mask),
            _valid(tasks.support_y[index], support_mask),
            _valid(tasks.query_x[index], query_mask),
            _valid(tasks.query_y[index], query_mask),
            _ways(tasks),
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


def _ways(tasks: TaskBatch) -> int | None:
    return tasks.ways if tasks.is_classification else None


def _run_task(task: _Task, initial: Parameters, inner: InnerLoop) -> tuple[Tensor, Tensor]:
    """(the task's meta-loss, its query outputs after the last step, detached)."""
    differentiable = torch.is_grad_enabled()
    parameters = dict(initial)
    directions = Directions(inner.optimizer)
    total: Tensor | None = None

    def add(weight: float, loss: Tensor) -> None:
        nonlocal total
        total = weight * loss if total is None else total + weight * loss

    for step in range(inner.steps):
        with torch.enable_grad():  # the inner gradient is needed where no outer one is, too
            current = _independent(parameters if differentiable else _detach(parameters), inner)
            loss = task.support_loss(current, inner.loss, step)
        counts = inner.step_weights[step] != 0
        if step == 0 and inner.support_weight != 0:
            add(inner.support_weight, loss)
        if counts:
            add(inner.step_weights[step], task.query_loss(task.query_outputs(current, step), inner.loss))
        with torch.enable_grad():
            parameters = _descend(
                current,
                loss,
                inner,
                step,
                directions,
                create_graph=differentiable and not inner.first_order,
                # These are parts of the meta-loss that go back through this step's support pass.
                keep=(step == 0 and inner.support_weight != 0) or (counts and task.model.reads_support_statistics),
            )
    if inner.steps == 0 and inner.support_weight != 0:
        add(inner.support_weight, task.support_loss(parameters, inner.loss, 0))
    with torch.set_grad_enabled(differentiable and inner.step_weights[-1] != 0):
        if task.model.reads_support_statistics:
            task.model.support(parameters, task.support_x)
        outputs = task.query_outputs(parameters, inner.steps)
        last = task.query_loss(outputs, inner.loss)  # computed in any case: it checks targets and ways
    if inner.step_weights[-1] != 0 or total is None:
        add(inner.step_weights[-1], last)
    assert total is not None
    return total if differentiable else total.detach(), outputs.detach()


def _detach(parameters: Parameters) -> dict[str, Tensor]:
    return {name: value.detach() for name, value in parameters.items()}


def _independent(parameters: Parameters, inner: InnerLoop) -> dict[str, Tensor]:
    """The parameters, the adapted ones as variables of their own.

    The inner gradient is the partial derivative at θₖ, even where one parameter was computed from another (a head
    made of prototypes that the adapted encoder gave): so each is an alias, upstream of nothing but the loss. One that
    is frozen for the outer loop becomes a leaf here.
    """
    return {
        name: value
        if name not in inner.rates
        else value.view_as(value)
        if value.requires_grad
        else value.detach().requires_grad_()
        for name, value in parameters.items()
    }


def _descend(
    parameters: Parameters,
    loss: Tensor,
    inner: InnerLoop,
    step: int,
    directions: Directions,
    create_graph: bool,
    keep: bool = False,
) -> dict[str, Tensor]:
    """θₖ₊₁ = θₖ − αₖ ⊙ dₖ, where dₖ is ∇L_support(θₖ) or what the inner optimizer makes of it."""
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
    if all(gradient is None for gradient in gradients):
        raise ValueError(
            "the support loss does not depend on any adapted parameter; if model was compiled or wraps a module that "
            "it does not register, pass the plain module"
        )
    for name, gradient in zip(adapted, gradients, strict=True):
        if gradient is not None:
            following[name] = parameters[name] - inner.rates[name].at(step) * directions.next(name, gradient)
    return following


# --- all tasks at once, for small nets ----------------------------------------------------------


# torch.func is exact through these (tests/test_torch_engine.py compares each with the loop). A class of the user's own
# may do anything in its forward, F.batch_norm included, and takes the loop.
_VMAP_MODULES = (nn.Sequential, nn.Linear, nn.Flatten, nn.Identity, nn.ReLU, nn.LeakyReLU, nn.Tanh, nn.Sigmoid, nn.GELU)


def _suits_vmap(model: nn.Module, tasks: TaskBatch, inner: InnerLoop) -> bool:
    """Whether torch.func.vmap is exact here and faster than the loop: full tasks, and a small net of Linear layers."""
    return (
        tasks.num_tasks > 1
        and tasks.support_mask is None
        and tasks.query_mask is None
        and not callable(inner.loss)
        and all(
            type(module) in _VMAP_MODULES and not module._forward_hooks and not module._forward_pre_hooks
            for module in model.modules()
        )
        and sum(parameter.numel() for parameter in model.parameters()) <= VMAP_MAX_PARAMETERS
    )


def _vmap_tasks(
    model: nn.Module, parameters: Parameters, per_task: set[str], tasks: TaskBatch, inner: InnerLoop
) -> tuple[Tensor, Tensor]:
    functional = FunctionalModel(model, inner.bn, elementary=True)
    ways = _ways(tasks)
    axes = {name: 0 if name in per_task else None for name in parameters}

    def support_loss(adapted: Parameters, fixed: Parameters, x: Tensor, y: Tensor) -> Tensor:
        return _loss(functional.support({**fixed, **adapted}, x), y, inner.loss, "support_y", ways)

    def query_loss(parameters: Parameters, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        outputs = functional.query(parameters, x)
        return _loss(outputs, y, inner.loss, "query_y", ways), outputs

    def task(
        initial: Parameters, support_x: Tensor, support_y: Tensor, query_x: Tensor, query_y: Tensor
    ) -> tuple[Tensor, Tensor]:
        current = dict(initial)
        directions = Directions(inner.optimizer)
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
                current[name] = current[name] - inner.rates[name].at(step) * directions.next(name, gradient)
        loss, outputs = query_loss(current, query_x, query_y)
        return total + inner.step_weights[-1] * loss, outputs

    total, outputs = vmap(task, in_dims=(axes, 0, 0, 0, 0))(
        dict(parameters), tasks.support_x, tasks.support_y, tasks.query_x, tasks.query_y
    )
    return total, outputs.detach()
