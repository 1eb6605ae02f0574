"""Which engine computes a meta-gradient, and the drop-in MAML step."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from innerloop import torch_engine
from innerloop.contract import Result
from innerloop.inner_loop import BatchNormMode, InnerLoop, InnerLR
from innerloop.inner_optimizers import InnerOptimizer
from innerloop.losses import Loss, accuracy_per_task
from innerloop.lowering import lowered
from innerloop.native_engine import inner_loop, prepare
from innerloop.ops import maml as native
from innerloop.registry import check_choice
from innerloop.tasks import TaskBatch

Engine = Literal["auto", "native", "torch"]
_ENGINES = get_args(Engine)

# An autograd loop over tasks is nothing that torch.compile should unroll: in a compiled step it runs as it is.
_by_torch = torch.compiler.disable(torch_engine.meta_result)


def check_engine(engine: Engine) -> Engine:
    """Refuse a name that is no engine."""
    check_choice(engine, "engine", _ENGINES)
    return engine


def check_lowers(model: nn.Module) -> None:
    """Refuse a model that the native engine cannot run.

    Raises:
        NotLowerable: a ValueError that names the layer.
    """
    error = lowered(model).error
    if error is not None:
        raise copy.copy(error)


def meta_result(
    model: nn.Module,
    tasks: TaskBatch,
    inner: InnerLoop,
    parameters: Mapping[str, Tensor] | None = None,
    engine: Engine = "auto",
) -> Result:
    """The meta-loss of a batch of tasks and what goes with it.

    Args:
        model: what runs. tasks: T tasks. inner: the inner loop.
        parameters: θ₀ in place of the model's own, shared or [T, *shape] (see :func:`torch_engine.meta_result`).
        engine: "native"; "torch"; or "auto", native wherever it computes the same.

    Raises:
        ValueError: the model's outputs are not as many as the tasks' ways; or engine is "native" and cannot be, and
            the message says why.
    """
    if engine != "torch":
        call = prepare(model, tasks, inner, parameters, engine)
        if call is not None:
            loss, task_losses, logits = native.maml(*call)
            accuracies = accuracy_per_task(logits, tasks.query_y, tasks.query_mask) if tasks.is_classification else None
            return Result(loss, task_losses, logits, accuracies)
    return _by_torch(model, _own(model, parameters), tasks, inner)


def adapt_tasks(
    model: nn.Module,
    tasks: TaskBatch,
    inner: InnerLoop,
    parameters: Mapping[str, Tensor] | None = None,
    engine: Engine = "auto",
    proximal: float = 0.0,
) -> dict[str, Tensor]:
    """θ_K of every task, by parameter name; detached. The arguments are those of :func:`meta_result`; proximal is λ of
    a descent along the gradient plus λ(θₖ − θ₀).

    Returns: [T, *shape] for a parameter that is adapted; θ₀ as it is for the others.
    """
    initial = {name: parameter.detach() for name, parameter in _own(model, parameters).items()}
    if engine != "torch":
        with torch.no_grad():
            given = None if parameters is None else initial
            call = prepare(model, tasks, inner, given, engine, all_ways=False)
        if call is not None:
            adapted = zip(lowered(model).names, native.adapt(*call, proximal), strict=True)
            # An adapted parameter that the Program does not use has no gradient, and stays as it is for every task.
            unused = {
                name: initial[name].expand(tasks.num_tasks, *parameter.shape)
                for name, parameter in model.named_parameters()
                if name in inner.rates
            }
            return initial | unused | {name: value for name, value in adapted if value.numel()}
    return initial | torch_engine.adapt_tasks(model, initial, tasks, inner, proximal)


def hessian_vector_products(
    model: nn.Module,
    tasks: TaskBatch,
    vectors: Mapping[str, Tensor],
    inner: InnerLoop,
    parameters: Mapping[str, Tensor] | None = None,
    engine: Engine = "auto",
) -> dict[str, Tensor]:
    """The Hessian of every task's support loss at its parameters, of those that have a vector, times it; detached.

    The arguments are those of :func:`meta_result`.

    Args:
        vectors: by name, [T, *shape]. inner: says what BatchNorm does and what the loss is; the Hessian is of the
            parameters that it adapts, which are those of vectors.

    Returns: [T, *shape] by name.
    """
    if engine != "torch":
        with torch.no_grad():
            call = prepare(model, tasks, inner, parameters, engine, all_ways=False)
        if call is not None:
            values, _, buffers, _, settings = call
            names = lowered(model).names
            given = [vectors.get(name, value.new_empty(0)) for name, value in zip(names, values, strict=True)]
            products = native.hessian_vector_product(values, given, buffers, tasks, settings)
            # A parameter that the Program does not use has no Hessian.
            unused = {name: torch.zeros_like(vector) for name, vector in vectors.items()}
            return unused | {name: value for name, value in zip(names, products, strict=True) if value.numel()}
    return torch_engine.hessian_vector_products(model, _own(model, parameters), tasks, vectors, inner)


def adapt(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    inner: InnerLoop,
    engine: Engine = "auto",
    parameters: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """θ_K of one task with support set x [S, ...], y [S] or [S, *out], by parameter name; detached.

    parameters: θ₀ in place of the model's own, of the parameters' shapes.
    """
    x, y = x.detach()[None], y.detach()[None]
    adapted = adapt_tasks(model, TaskBatch(x, y, x, y), inner, parameters, engine)
    return {name: value[0] if name in inner.rates else value for name, value in adapted.items()}


def maml_loss(
    model: nn.Module,
    tasks: TaskBatch,
    *,
    inner_lr: InnerLR,
    inner_steps: int = 1,
    step_weights: Sequence[float] | Tensor | None = None,
    support_weight: float = 0.0,
    adapt: str | Iterable[str] | None = None,
    first_order: bool = False,
    bn: BatchNormMode = "transductive",
    loss: Loss = "cross_entropy",
    inner_optimizer: InnerOptimizer = "sgd",
    engine: Engine = "auto",
) -> Tensor:
    """The MAML meta-loss of a batch of tasks: a drop-in step for any model and any torch optimizer.

    Computes mean over tasks of [ u·L_support(θ₀) + Σₖ wₖ L_query(θₖ) ] with θₖ₊₁ = θₖ − αₖ ⊙ ∇L_support(θₖ)
    (Finn et al. 2017, algorithm 1, for K steps). Calling ``.backward()`` on it fills the ``.grad`` of the model's
    parameters, and of inner_lr where that requires grad. The model's buffers are never written.

    Args:
        model: any module; called with [S, ...] and [Q, ...] samples of one task.
        tasks: T tasks.
        inner_lr: α: a number; a tensor, 0-d or [K]; or a mapping from parameter name, name prefix or pattern to a
            number or a tensor that is 0-d, [K], parameter-shaped or [K, *parameter]. The longest name counts, and any
            name before a pattern; what a mapping does not name has α = 0.
        inner_steps: K, at least 0.
        step_weights: w, K + 1 numbers for θ₀ … θ_K. None: (0, …, 0, 1).
        support_weight: u.
        adapt: names, name prefixes ("encoder.0" for all under it) or patterns (``*.lora_*``, ``*`` being any text) of
            the parameters that are adapted. None: all that require grad.
        first_order: drop the second derivatives (FOMAML).
        bn: what BatchNorm normalises with: "transductive", the statistics of whatever batch is fed; "support", the
            query with the statistics of the support set; "running", the module's running statistics.
        loss: "cross_entropy", "mse", nn.CrossEntropyLoss() (label_smoothing too), nn.MSELoss(), or any callable
            (outputs [N, *out], targets) → 0-d mean loss, which takes the torch engine.
        inner_optimizer: what makes a step of the gradients: "sgd", as above; "momentum" of 0.9, or "adam" with the
            defaults of torch.optim.Adam, both on the torch engine, and differentiated through.
        engine: "auto", the native engine where it can compute this and else the torch engine, said once in the log
            "innerloop"; "native", which raises where it cannot; "torch". The native engine's gradient cannot be
            differentiated again: that raises. :func:`innerloop.explain` says what becomes of a model.

    Returns: 0-d loss.

    Raises:
        TypeError, ValueError: an argument that does not fit; the message names it and what was expected.

    Warns:
        SecondOrderWarning: the model has attention or recurrent kernels without a second derivative, and slower ones
            take their place; once for a model.

    Examples:
        One task, y = 2 at x = 1, and the model θx at θ = 0: the inner step leads to θ₁ = θ − α·2(θ − 2) = 1, the loss
        is (θ₁ − 2)², and its derivative goes through the step: 2(θ₁ − 2)(1 − 2α).

        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> model.load_state_dict({"weight": torch.zeros(1, 1)})
        <All keys matched successfully>
        >>> x, y = torch.ones(1, 1, 1), torch.full((1, 1, 1), 2.0)  # [T, samples, features]
        >>> tasks = innerloop.TaskBatch(x, y, x, y)
        >>> loss = innerloop.maml_loss(model, tasks, inner_lr=0.25, loss="mse")
        >>> loss.backward()
        >>> loss.item(), model.weight.grad.item()
        (1.0, -1.0)
    """
    check_engine(engine)
    network = None if engine == "torch" or torch.compiler.is_compiling() else lowered(model)
    inner = inner_loop(
        model,
        network,
        inner_lr=inner_lr,
        inner_steps=inner_steps,
        step_weights=step_weights,
        support_weight=support_weight,
        adapt=adapt,
        first_order=first_order,
        bn=bn,
        loss=loss,
        inner_optimizer=inner_optimizer,
    )
    if engine != "torch":
        call = prepare(model, tasks, inner, None, engine, network)
        if call is not None:
            return native.maml(*call)[0]
    return _by_torch(model, _own(model, None), tasks, inner).loss


def _own(model: nn.Module, parameters: Mapping[str, Tensor] | None) -> Mapping[str, Tensor]:
    return dict(model.named_parameters()) if parameters is None else parameters
