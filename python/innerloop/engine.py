"""Which engine computes a meta-gradient, and the drop-in MAML step."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, get_args

from torch import Tensor, nn

from innerloop import torch_engine
from innerloop.contract import Result
from innerloop.inner_loop import BatchNormMode, InnerLoop, InnerLR
from innerloop.losses import Loss
from innerloop.registry import nearest
from innerloop.tasks import TaskBatch

Engine = Literal["auto", "native", "torch"]


def check_engine(engine: Engine) -> Engine:
    """Refuse a name that is no engine, and an engine that is not there."""
    if engine not in get_args(Engine):
        raise ValueError(f"engine is {engine!r}.{nearest(str(engine), list(get_args(Engine)))}")
    if engine == "native":
        raise ValueError("engine is 'native', but this version has the torch engine alone; use 'auto' or 'torch'")
    return engine


def meta_result(
    model: nn.Module, tasks: TaskBatch, inner: InnerLoop, parameters: Mapping[str, Tensor] | None = None
) -> Result:
    """The meta-loss of a batch of tasks and what goes with it.

    Args:
        model: what runs. tasks: T tasks. inner: the inner loop.
        parameters: θ₀ in place of the model's own, shared or [T, *shape] (see :func:`torch_engine.meta_result`).

    Raises:
        ValueError: the model's outputs are not as many as the tasks' ways.
    """
    own = dict(model.named_parameters()) if parameters is None else parameters
    return torch_engine.meta_result(model, own, tasks, inner)


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
    engine: Engine = "auto",
) -> Tensor:
    """The MAML meta-loss of a batch of tasks: a drop-in step for any model and any torch optimizer.

    Computes mean over tasks of [ u·L_support(θ₀) + Σₖ wₖ L_query(θₖ) ] with θₖ₊₁ = θₖ − αₖ ⊙ ∇L_support(θₖ)
    (Finn et al. 2017, algorithm 1, for K steps). Calling ``.backward()`` on it fills the ``.grad`` of the model's
    parameters, and of inner_lr where that requires grad. The model's buffers are never written.

    Args:
        model: any module; called with [S, ...] and [Q, ...] samples of one task.
        tasks: T tasks.
        inner_lr: α: a number; a tensor, 0-d or [K]; or a mapping from parameter name or name prefix to a number or a
            tensor that is 0-d, [K], parameter-shaped or [K, *parameter]. What a mapping does not name has α = 0.
        inner_steps: K, at least 0.
        step_weights: w, K + 1 numbers for θ₀ … θ_K. None: (0, …, 0, 1).
        support_weight: u.
        adapt: names or name prefixes of the parameters that are adapted. None: all that require grad.
        first_order: drop the second derivatives (FOMAML).
        bn: what BatchNorm normalises with: "transductive", the statistics of whatever batch is fed; "support", the
            query with the statistics of the support set; "running", the module's running statistics.
        loss: "cross_entropy", "mse", or a callable (outputs [N, *out], targets) → 0-d mean loss.
        engine: "auto", "native" or "torch".

    Returns: 0-d loss.

    Raises:
        TypeError, ValueError: an argument that does not fit; the message names it and what was expected.
    """
    check_engine(engine)
    inner = InnerLoop.create(
        model,
        inner_lr=inner_lr,
        inner_steps=inner_steps,
        step_weights=step_weights,
        support_weight=support_weight,
        adapt=adapt,
        first_order=first_order,
        bn=bn,
        loss=loss,
    )
    return meta_result(model, tasks, inner).loss
