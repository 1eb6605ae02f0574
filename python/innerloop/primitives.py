"""What gradient-based methods are made of, each for a whole batch of tasks at once: a new method is written with them.

Symbols: θ the meta-parameters, φ_t what they are adapted to on task t. Parameters go in and come out as dictionaries by
the names of ``model.named_parameters()``; a tensor has the parameter's shape where tasks share it, or [T, *shape] where
each task has its own. Everything that comes out is a number and not a graph: no autograd of the caller's is involved,
and :func:`with_gradient` hands a method's gradient to the optimizer. docs/gradient-methods.md writes a method so.

The arguments that all have in common:

- model: any module; it is not changed. tasks: T tasks, on the model's device.
- parameters: θ or φ in place of the model's own, for the names that it holds.
- bn: what BatchNorm normalises with: "transductive", the batch at hand; "support", the query with the statistics of the
  support set; "running", the module's running statistics.
- loss: "cross_entropy", "mse", nn.CrossEntropyLoss(), nn.MSELoss(), or a callable (outputs, targets) → 0-d mean loss.
- engine: "auto", the native engine where it can compute this and else the torch engine, said once in the log
  "innerloop"; "native", which raises a ValueError with the reason where it cannot; "torch".

Where an argument is wrong, a TypeError or ValueError names it and what was expected. A tensor that requires grad is
refused while gradients are recorded, except for the model's own parameters: what comes out could not be differentiated.

torch.compile leaves a call of adapt, meta_gradient or hessian_vector_product as it is, between the graphs of what is
before and after it: each is a native call, or a loop of autograd that no graph could hold. Asked for one graph, by
``fullgraph=True``, it raises.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from innerloop import engine as engines
from innerloop.contract import Result
from innerloop.functional import FunctionalModel
from innerloop.inner_loop import BatchNormMode, InnerLR
from innerloop.losses import Loss
from innerloop.native_engine import inner_loop
from innerloop.ops._differentiable import transforms_active
from innerloop.ops.maml import with_gradients
from innerloop.registry import nearest
from innerloop.tasks import TaskBatch

Parameters = Mapping[str, Tensor]


Function = TypeVar("Function", bound=Callable[..., Any])


def _between_graphs(function: Function) -> Function:
    """The function, not traced by torch.compile."""
    untraced: Function = torch.compiler.disable(function, reason="innerloop.primitives compute numbers, and no graph")
    return untraced


@_between_graphs
def adapt(
    model: nn.Module,
    tasks: TaskBatch,
    *,
    inner_lr: InnerLR,
    inner_steps: int = 1,
    proximal: float = 0.0,
    adapt: str | Iterable[str] | None = None,
    parameters: Parameters | None = None,
    bn: BatchNormMode = "transductive",
    loss: Loss = "cross_entropy",
    engine: engines.Engine = "auto",
) -> dict[str, Tensor]:
    """The inner loop of every task: φ after K gradient steps on its support set.

    φ ← φ − α ⊙ (∇L_support(φ) + λ(φ − θ)), K times from φ = θ. With λ = 0 it is that of MAML (Finn et al. 2017,
    algorithm 1); λ is iMAML's (Rajeswaran et al. 2019, section 2.2).

    Args:
        inner_lr: α, as :func:`innerloop.maml_loss` takes it. inner_steps: K. proximal: λ, at least 0.
        adapt: names or name prefixes of the parameters that are adapted; None: all of the model's that require grad.
        model, tasks, parameters, bn, loss, engine: see the module.

    Returns: [T, *shape] of every parameter that is adapted; the others as they came.

    Examples:
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> x, y = torch.ones(2, 1, 1), torch.tensor([1.0, 2.0]).view(2, 1, 1)  # two tasks of one sample
        >>> tasks = innerloop.TaskBatch(x, y, x, y)
        >>> theta = {"weight": torch.zeros(1, 1)}
        >>> phi = innerloop.primitives.adapt(model, tasks, inner_lr=0.25, parameters=theta, loss="mse")
        >>> phi["weight"].flatten()
        tensor([0.5000, 1.0000])
    """
    if not (math.isfinite(proximal) and proximal >= 0):
        raise ValueError(f"proximal is {proximal!r}, expected a finite number of at least 0")
    engines.check_engine(engine)
    tasks = _plain_tasks(tasks)
    inner = inner_loop(
        model, inner_lr=_plain_rate(inner_lr), inner_steps=inner_steps, adapt=_names(adapt), bn=bn, loss=loss
    )
    initial = _initial(model, tasks, parameters)
    return engines.adapt_tasks(model, tasks, inner, initial, engine, proximal)


def learner(
    model: nn.Module,
    support_x: Tensor,
    support_y: Tensor,
    *,
    inner_lr: InnerLR,
    inner_steps: int = 1,
    proximal: float = 0.0,
    adapt: str | Iterable[str] | None = None,
    bn: BatchNormMode = "transductive",
    loss: Loss = "cross_entropy",
    engine: engines.Engine = "auto",
) -> nn.Module:
    """One task's model after the inner loop: what ``Algorithm.adapt`` returns.

    Args:
        support_x: [S, ...]. support_y: [S] or [S, *out].
        model, inner_lr, inner_steps, proximal, adapt, bn, loss, engine: see :func:`adapt` and the module.

    Returns: a module that maps query_x [Q, ...] to outputs [Q, *out], independent of the model's parameters.

    Examples:
        >>> model = innerloop.models.build("mlp")((1, 28, 28), outputs=3)
        >>> images, labels = torch.rand(6, 1, 28, 28), torch.arange(3).repeat(2)
        >>> learner = innerloop.primitives.learner(model, images, labels, inner_lr=0.1, inner_steps=5)
        >>> learner(torch.rand(10, 1, 28, 28)).shape
        torch.Size([10, 3])
    """
    x, y = support_x.detach()[None], support_y.detach()[None]
    adapted = _adapt(
        model, TaskBatch(x, y, x, y), inner_lr=inner_lr, inner_steps=inner_steps, proximal=proximal, adapt=adapt,
        bn=bn, loss=loss, engine=engine,
    )  # fmt: skip
    own = {name: adapted[name].reshape(parameter.shape) for name, parameter in model.named_parameters()}
    return FunctionalModel(model, bn).as_module(own, x[0])


_adapt = adapt  # for a function with an argument of that name


@_between_graphs
def meta_gradient(
    model: nn.Module,
    tasks: TaskBatch,
    *,
    parameters: Parameters | None = None,
    inner_lr: InnerLR | None = None,
    inner_steps: int = 0,
    step_weights: Sequence[float] | None = None,
    support_weight: float = 0.0,
    adapt: str | Iterable[str] | None = None,
    first_order: bool = False,
    bn: BatchNormMode = "transductive",
    loss: Loss = "cross_entropy",
    engine: engines.Engine = "auto",
) -> tuple[dict[str, Tensor], Result]:
    """The exact gradient of the meta-loss, and the meta-loss with all that an algorithm reports.

    The meta-loss of a task is u·L_support(θ₀) + Σₖ wₖ L_query(θₖ), as in :func:`innerloop.maml_loss`. Without an inner
    step it is the query loss at the parameters given, and with ``step_weights=[0], support_weight=1`` the support loss.

    Args:
        inner_lr: α, as maml_loss takes it; it may be left out where inner_steps is 0. inner_steps: K.
        step_weights: w, K + 1 numbers; None: (0, …, 0, 1). support_weight: u.
        adapt: names or name prefixes of the parameters that are adapted; None: all of the model's that require grad.
        first_order: drop the second derivatives.
        model, tasks, parameters, bn, loss, engine: see the module.

    Returns: (gradients, result). The gradient of every parameter of the model that requires grad is the mean of the
        tasks' over those that share it: of the parameter's shape where all do; where each task has its own,
        [T, *shape] with the gradient of that task's own meta-loss. The result's loss is detached.

    Examples:
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> x, y = torch.ones(2, 1, 1), torch.tensor([1.0, 2.0]).view(2, 1, 1)  # two tasks of one sample
        >>> tasks = innerloop.TaskBatch(x, y, x, y)
        >>> gradients, result = innerloop.primitives.meta_gradient(
        ...     model, tasks, parameters={"weight": torch.zeros(1, 1)}, inner_lr=0.25, inner_steps=1, loss="mse"
        ... )
        >>> gradients["weight"], result.task_losses
        (tensor([[-0.7500]]), tensor([0.2500, 1.0000]))
    """
    if inner_lr is None and inner_steps != 0:
        raise ValueError(f"inner_lr is None with inner_steps {inner_steps!r}, expected a step size")
    _refuse_inference_mode()
    engines.check_engine(engine)
    tasks = _plain_tasks(tasks)
    inner = inner_loop(
        model,
        inner_lr=0.0 if inner_lr is None else _plain_rate(inner_lr),
        inner_steps=inner_steps,
        step_weights=step_weights,
        support_weight=support_weight,
        adapt=_names(adapt),
        first_order=first_order,
        bn=bn,
        loss=loss,
    )
    initial = _initial(model, tasks, parameters)
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    variables = {name: initial[name].detach().requires_grad_() for name in names}
    with torch.enable_grad():
        result = engines.meta_result(model, tasks, inner, initial | variables, engine)
        found: Sequence[Tensor | None] = [None] * len(variables)
        if result.loss.requires_grad:
            found = torch.autograd.grad(result.loss, list(variables.values()), allow_unused=True)
    gradients = {}
    for (name, variable), gradient in zip(variables.items(), found, strict=True):
        if gradient is None:
            gradients[name] = torch.zeros_like(variable, requires_grad=False)
        else:  # of the mean over tasks; a task's own has only its share of it
            is_shared = variable.shape == model.get_parameter(name).shape
            gradients[name] = gradient if is_shared else gradient * tasks.num_tasks
    return gradients, replace(result, loss=result.loss.detach())


@_between_graphs
def hessian_vector_product(
    model: nn.Module,
    tasks: TaskBatch,
    vectors: Parameters,
    *,
    parameters: Parameters | None = None,
    bn: BatchNormMode = "transductive",
    loss: Loss = "cross_entropy",
    engine: engines.Engine = "auto",
) -> dict[str, Tensor]:
    """H_support(φ_t)·v_t of every task: the Hessian of its support loss at its parameters, times a vector; exact.

    Args:
        vectors: v by parameter name, of the parameter's shape or [T, *shape]. The Hessian is of the parameters that it
            names; the others are constants.
        model, tasks, parameters, bn, loss, engine: see the module.

    Returns: [T, *shape] by the names of vectors.

    Examples:
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> x, y = torch.ones(2, 1, 1), torch.tensor([1.0, 2.0]).view(2, 1, 1)  # two tasks of one sample
        >>> tasks = innerloop.TaskBatch(x, y, x, y)
        >>> vectors = {"weight": torch.tensor([[3.0]])}
        >>> innerloop.primitives.hessian_vector_product(model, tasks, vectors, loss="mse")["weight"].flatten()
        tensor([6., 6.])
    """
    _refuse_inference_mode()
    engines.check_engine(engine)
    tasks = _plain_tasks(tasks)
    if not vectors:
        raise ValueError("vectors is empty, expected a tensor for each parameter that the Hessian is of")
    initial = _initial(model, tasks, parameters)
    expanded = {}
    for name, vector in _plain_parameters(model, tasks.num_tasks, vectors, "vectors").items():
        _check_kind(vector, initial[name], f"vectors[{name!r}]")
        expanded[name] = vector.expand(tasks.num_tasks, *model.get_parameter(name).shape)
    inner = inner_loop(model, inner_lr=0.0, inner_steps=0, adapt=tuple(expanded), bn=bn, loss=loss)
    return engines.hessian_vector_products(model, tasks, expanded, inner, initial, engine)


def with_gradient(result: Result, model: nn.Module, gradients: Parameters) -> Result:
    """The result with a loss whose ``.backward()`` adds these gradients to the model's: what ``forward`` returns.

    Args:
        result: of T tasks. model: whose parameters are learned.
        gradients: by parameter name, of the parameter's shape; or [T, *shape], of which the mean over tasks is taken.

    Returns: the result; its loss cannot be differentiated twice: that raises. Under ``torch.no_grad()`` it is detached.

    Examples:
        >>> model = torch.nn.Linear(4, 2)
        >>> result = innerloop.Result.of(torch.rand(3, 5, 2), torch.zeros(3, 5, dtype=torch.int64), mask=None)
        >>> result = innerloop.primitives.with_gradient(result, model, {"bias": torch.tensor([1.0, -1.0])})
        >>> result.loss.backward()
        >>> model.bias.grad
        tensor([ 1., -1.])
    """
    own = dict(model.named_parameters())
    final = {}
    for name, gradient in _plain_parameters(model, len(result.task_losses), gradients, "gradients").items():
        _check_kind(gradient, own[name], f"gradients[{name!r}]")
        if not own[name].requires_grad:
            raise ValueError(f"gradients has {name!r}, which does not require grad in the model")
        final[name] = gradient if gradient.shape == own[name].shape else gradient.mean(0)
    loss = with_gradients(result.loss.detach(), list(final.values()), [own[name] for name in final])
    return replace(result, loss=loss)


# --- what is refused ------------------------------------------------------------------------------


def _plain_tasks(tasks: TaskBatch) -> TaskBatch:
    """The tasks without graphs of their tensors, which must be of no consequence."""
    if transforms_active():
        raise ValueError(
            "a torch.func transform or forward-mode differentiation is active, and what this computes cannot be "
            "transformed: use innerloop.maml_loss with engine='torch'"
        )
    if not any(tensor.requires_grad for tensor in (tasks.support_x, tasks.support_y, tasks.query_x, tasks.query_y)):
        return tasks
    return replace(
        tasks,
        support_x=_plain(tasks.support_x, "tasks.support_x"),
        support_y=_plain(tasks.support_y, "tasks.support_y"),
        query_x=_plain(tasks.query_x, "tasks.query_x"),
        query_y=_plain(tasks.query_y, "tasks.query_y"),
    )


def _plain(tensor: Tensor, argument: str) -> Tensor:
    if tensor.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{argument} requires grad, but what this computes is not differentiable: pass it detached")
    return tensor.detach()


def _initial(model: nn.Module, tasks: TaskBatch, given: Parameters | None) -> dict[str, Tensor]:
    """All parameters: those given, and the model's own."""
    own = {name: parameter.detach() for name, parameter in model.named_parameters()}
    return own | _plain_parameters(model, tasks.num_tasks, given or {}, "parameters")


def _plain_parameters(model: nn.Module, tasks: int, given: Parameters, argument: str) -> dict[str, Tensor]:
    """Tensors by the names of parameters, of their shapes or [T, *shape]; the model's own may require grad."""
    own = dict(model.named_parameters())
    plain = {}
    for name, value in given.items():
        what = f"{argument}[{name!r}]"
        if name not in own:
            raise ValueError(f"{argument} has {name!r}, which is no parameter of the model.{nearest(name, list(own))}")
        if not isinstance(value, Tensor):
            raise TypeError(f"{what} must be a torch.Tensor, got {type(value).__name__}")
        shape = tuple(own[name].shape)
        if value.shape not in (shape, (tasks, *shape)):
            raise ValueError(
                f"{what} has shape {tuple(value.shape)}, expected {shape}, or {(tasks, *shape)} with one for each task"
            )
        plain[name] = value.detach() if value is own[name] else _plain(value, what)
    return plain


def _check_kind(tensor: Tensor, parameter: Tensor, what: str) -> None:
    if tensor.dtype != parameter.dtype or tensor.device != parameter.device:
        raise TypeError(
            f"{what} is {tensor.dtype} on {tensor.device}, expected the parameter's {parameter.dtype} on "
            f"{parameter.device}"
        )


def _refuse_inference_mode() -> None:
    if torch.is_inference_mode_enabled():  # torch records no gradient in it, not even one asked for inside
        raise RuntimeError("this computes gradients, which torch.inference_mode() rules out: use torch.no_grad()")


def _plain_rate(inner_lr: InnerLR) -> InnerLR:
    if isinstance(inner_lr, Tensor):
        return _plain(inner_lr, "inner_lr")
    if not isinstance(inner_lr, Mapping):
        return inner_lr
    return {
        name: _plain(rate, f"inner_lr[{name!r}]") if isinstance(rate, Tensor) else rate
        for name, rate in inner_lr.items()
    }


def _names(adapt: str | Iterable[str] | None) -> str | tuple[str, ...] | None:
    """As something that can be a key: engines keep what they have checked."""
    return adapt if adapt is None or isinstance(adapt, str) else tuple(adapt)
