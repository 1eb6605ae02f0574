"""The meta-loss of a batch of tasks and its exact gradient, in one native call.

The op computes loss and gradients together (csrc/engine/recurrence.h), so its backward only hands over what is there
already, times the upstream gradient. That backward is an op of its own whose derivative raises: the gradient of a
gradient is not computed here, and must not silently be zero.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import compress
from typing import Any, NoReturn

import torch
from torch import Tensor

from innerloop._library import raise_interrupt
from innerloop.ops._differentiable import register_fake
from innerloop.program import decoded_outputs, decoded_parameters
from innerloop.tasks import TaskBatch

#: What an automatic choice is in Settings.paths, in order: lanes, low_rank, conv_block, winograd, patch_moments,
#: kept_passes.
AUTOMATIC = (1, 1, 1, 1, 1, 1)


@dataclass(frozen=True)
class Settings:
    """What the native inner loop is asked to do, as the op takes it.

    Attributes:
        program: Program.encode(). bn: 0 transductive, 1 support, 2 running. loss: 0 cross-entropy, 1 mse.
        label_smoothing: of the cross-entropy. steps: K. step_weights: w. support_weight: u. first_order: drop H.
        paths: for each specialised path 0 off, 1 chosen by cost, 2 forced where it applies.
    """

    program: Sequence[int]
    bn: int
    loss: int
    label_smoothing: float
    steps: int
    step_weights: Sequence[float]
    support_weight: float
    first_order: bool
    paths: Sequence[int] = AUTOMATIC


def maml(
    parameters: list[Tensor], rates: list[Tensor], buffers: list[Tensor], tasks: TaskBatch, settings: Settings
) -> tuple[Tensor, Tensor, Tensor]:
    """The meta-loss, differentiable once in parameters and rates.

    Args:
        parameters: θ₀ in the program's order, of the parameter's shape or [T, *shape].
        rates: α of every parameter, [1 or K, 1 or numel]; [0, 0] where it is not adapted.
        buffers: running statistics, in the program's order.

    Returns: (loss, 0-d; task losses [T]; outputs [T, Q, out] at θ_K), the latter two not differentiable. Where a
    gradient is not wanted (no_grad, or nothing requires it), none is computed.

    Raises:
        RuntimeError: from the op, for tensors that do not fit; from backward, where the gradient is to be
            differentiated again.
    """
    grad = torch.is_grad_enabled()
    needs = [grad and parameter.requires_grad for parameter in parameters]
    learn_rates = grad and any(rate.requires_grad for rate in rates)
    if torch.compiler.is_compiling():  # the op's own autograd, which a compiled graph needs
        loss, task_losses, logits = _call(parameters, rates, buffers, tasks, settings, needs, learn_rates)[:3]
        return loss, task_losses.detach(), logits.detach()
    if not (learn_rates or any(needs)):
        loss, task_losses, logits = _eager_call(parameters, rates, buffers, tasks, settings, needs, False)[:3]
        return loss, task_losses, logits
    loss, task_losses, logits, *gradients = _eager_call(parameters, rates, buffers, tasks, settings, needs, learn_rates)
    tensors, wanted = parameters, needs
    if learn_rates:
        tensors, wanted = [*parameters, *rates], [*needs, *(rate.numel() > 0 for rate in rates)]
    if not all(wanted):
        tensors, gradients = list(compress(tensors, wanted)), list(compress(gradients, wanted))
    return _with_own_gradients(loss, gradients, tensors), task_losses, logits


def adapt(
    parameters: list[Tensor],
    rates: list[Tensor],
    buffers: list[Tensor],
    tasks: TaskBatch,
    settings: Settings,
    proximal: float = 0.0,
) -> list[Tensor]:
    """θ_K of every parameter that is adapted, [T, *shape], for the tasks' support sets; a 0-element tensor for the
    others. proximal: λ, descent being along the gradient plus λ(θₖ − θ₀)."""
    with torch.no_grad(), torch._C._AutoDispatchBelowAutograd():
        adapted = _interruptible(
            torch.ops.innerloop.maml_adapt.default,
            parameters, rates, buffers, tasks.support_x, tasks.support_y, tasks.support_mask, settings.program,
            settings.bn, settings.loss, settings.label_smoothing, settings.steps, proximal, settings.paths,
        )  # fmt: skip
    return adapted


def hessian_vector_product(
    parameters: list[Tensor], vectors: list[Tensor], buffers: list[Tensor], tasks: TaskBatch, settings: Settings
) -> list[Tensor]:
    """Per task, the Hessian of its support loss at its parameters times its vector; not differentiable.

    Args:
        parameters: in the program's order, of the parameter's shape or [T, *shape].
        vectors: for each parameter [T, *shape]; a 0-element tensor where the Hessian is not of it.
        buffers: running statistics, in the program's order.

    Returns: [T, *shape] for each parameter with a vector; a 0-element tensor for the others.
    """
    with torch.no_grad(), torch._C._AutoDispatchBelowAutograd():
        products = _interruptible(
            torch.ops.innerloop.hessian_vector_product.default,
            parameters, vectors, buffers, tasks.support_x, tasks.support_y, tasks.support_mask, settings.program,
            settings.bn, settings.loss, settings.label_smoothing, settings.paths,
        )  # fmt: skip
    return products


def plan(
    parameters: list[Tensor], rates: list[Tensor], buffers: list[Tensor], tasks: TaskBatch, settings: Settings
) -> str:
    """How the native engine would run a training step: a line for each layer."""
    return torch.ops.innerloop.maml_plan(
        parameters, rates, buffers, tasks.support_x, tasks.support_y, tasks.query_x, tasks.query_y,
        tasks.support_mask, tasks.query_mask, settings.program, settings.bn, settings.loss, settings.label_smoothing,
        settings.steps, settings.step_weights, settings.support_weight, settings.first_order, settings.paths,
    )  # fmt: skip


def _call(
    parameters: list[Tensor],
    rates: list[Tensor],
    buffers: list[Tensor],
    tasks: TaskBatch,
    settings: Settings,
    needs: list[bool],
    learn_rates: bool,
) -> list[Tensor]:
    """[meta-loss, task losses, outputs, a gradient for each parameter, and if learn_rates one for each rate]."""
    return torch.ops.innerloop.maml.default(
        parameters, rates, buffers, tasks.support_x, tasks.support_y, tasks.query_x, tasks.query_y,
        tasks.support_mask, tasks.query_mask, settings.program, settings.bn, settings.loss, settings.label_smoothing,
        settings.steps, settings.step_weights, settings.support_weight, settings.first_order, needs, learn_rates,
        settings.paths,
    )  # fmt: skip


def _eager_call(*arguments: Any) -> list[Tensor]:
    """The call without the autograd that torch.library gave the op, whose way through Python costs as much as the inner
    loop of a small net."""
    with torch._C._AutoDispatchBelowAutograd():
        return _interruptible(_call, *arguments)


def _interruptible(op: Callable[..., list[Tensor]], *arguments: Any) -> list[Tensor]:
    """The op's results; what a signal handler raised meanwhile, such as Ctrl-C's KeyboardInterrupt, is raised here."""
    try:
        return op(*arguments)
    except RuntimeError as error:
        if "interrupted by a signal" not in str(error):
            raise
    raise_interrupt()
    raise KeyboardInterrupt


def with_gradients(loss: Tensor, gradients: list[Tensor], tensors: Sequence[Tensor]) -> Tensor:
    """The loss, as a function of tensors that has these gradients, computed already; they cannot be differentiated
    again: that raises."""
    differentiable: Tensor = _WithGradients.apply([loss], gradients, *tensors)
    return differentiable


def _with_own_gradients(loss: Tensor, gradients: list[Tensor], tensors: Sequence[Tensor]) -> Tensor:
    """The same for gradients that an op made a moment ago and nobody else has, outside torch.func and torch.compile."""
    # Function's own apply sees to torch.func first, for microseconds.
    apply = super(torch.autograd.Function, _WithOwnGradients).apply
    differentiable: Tensor = apply([loss], gradients, *tensors)
    return differentiable


class _WithGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: list[Tensor], gradients: list[Tensor], *tensors: Tensor) -> Tensor:
        ctx.gradients = gradients
        # Kept so that one written to before backward is noticed, as torch's own functions notice it.
        ctx.save_for_backward(*tensors)
        return loss[0]

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *_scaled(upstream, ctx.gradients, ctx.saved_tensors)


class _WithOwnGradients(_WithGradients):
    """A backward that is the last gives the gradients away: they become the parameters' .grad as they are, for six
    products of a small net's gradients with 1 take longer than a layer of its inner loop."""

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled() or torch._C._autograd._get_current_graph_task_keep_graph():
            return _WithGradients.backward(ctx, upstream)
        _ = ctx.saved_tensors  # raises where one was written to, or this is not the first backward
        gradients, ctx.gradients = ctx.gradients, None
        if upstream.is_cuda or upstream.item() != 1:
            torch._foreach_mul_(gradients, upstream)
        return None, None, *gradients


def _scaled(upstream: Tensor, gradients: list[Tensor], differentiated: Sequence[Tensor]) -> Sequence[Tensor]:
    """The gradients of tensors times the upstream gradient; where they are to be differentiated, by the op that
    raises."""
    if torch.is_grad_enabled():
        return torch.ops.innerloop.maml_backward(upstream, gradients, list(differentiated))
    return torch._foreach_mul(gradients, upstream)


@torch.library.custom_op("innerloop::maml_backward", mutates_args=())
def _maml_backward(upstream: Tensor, gradients: list[Tensor], tensors: list[Tensor]) -> list[Tensor]:
    """The gradients of tensors, times the upstream gradient."""
    return list(torch._foreach_mul(gradients, upstream))


@_maml_backward.register_fake
def _(upstream: Tensor, gradients: list[Tensor], tensors: list[Tensor]) -> list[Tensor]:
    return [torch.empty_like(gradient) for gradient in gradients]


def _refuse(ctx: Any, *_: Any) -> None:
    raise RuntimeError(
        "this meta-gradient was computed together with its loss and cannot be differentiated again (a gradient penalty "
        "on the meta-loss, or a Hessian of it): where it is MAML's or a relative's, use engine='torch'"
    )


_maml_backward.register_autograd(_refuse, setup_context=lambda ctx, inputs, output: None)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    parameters, rates, buffers = inputs[:3]
    tensors, gradients = [*parameters, *rates], output[3:]
    ctx.lengths = len(parameters), len(rates), len(buffers)
    ctx.set_materialize_grads(False)
    ctx.places = [place for place, gradient in enumerate(gradients) if gradient.numel()]
    ctx.save_for_backward(*(tensors[place] for place in ctx.places), *(gradients[place] for place in ctx.places))


def _backward(ctx: Any, upstream: list[Tensor | None]) -> tuple[Any, ...]:
    parameters, rates, buffers = ctx.lengths
    if upstream[1] is not None or upstream[2] is not None:
        raise RuntimeError("innerloop::maml has gradients of its first output, the meta-loss, alone")
    results: list[Tensor | None] = [None] * (parameters + rates)
    if upstream[0] is not None:
        count = len(ctx.places)
        differentiated, gradients = list(ctx.saved_tensors[:count]), list(ctx.saved_tensors[count:])
        for place, gradient in zip(ctx.places, _scaled(upstream[0], gradients, differentiated), strict=True):
            results[place] = gradient
    return results[:parameters], results[parameters:], [None] * buffers, *[None] * 17


def _fake(
    parameters: list[Tensor],
    rates: list[Tensor],
    buffers: list[Tensor],
    support_x: Tensor,
    support_y: Tensor,
    query_x: Tensor,
    query_y: Tensor,
    support_mask: Tensor | None,
    query_mask: Tensor | None,
    program: list[int],
    bn: int,
    loss: int,
    label_smoothing: float,
    steps: int,
    step_weights: list[float],
    support_weight: float,
    first_order: bool,
    needs_gradient: list[bool],
    rate_gradients: bool,
    paths: list[int],
) -> list[Tensor]:
    outputs = decoded_outputs(program, tuple(support_x.shape[2:]), [tuple(p.shape) for p in parameters])
    return [
        support_x.new_empty(()),
        support_x.new_empty(query_x.shape[:1]),
        support_x.new_empty((*query_x.shape[:2], outputs)),
        *(p.new_empty(p.shape if needed else 0) for p, needed in zip(parameters, needs_gradient, strict=True)),
        *(rate.new_empty(rate.shape if rate.numel() else 0) for rate in rates if rate_gradients),
    ]


def _fake_adapted(
    parameters: list[Tensor],
    rates: list[Tensor],
    buffers: list[Tensor],
    support_x: Tensor,
    support_y: Tensor,
    support_mask: Tensor | None,
    program: list[int],
    *_: Any,
) -> list[Tensor]:
    shapes = decoded_parameters(program, [tuple(p.shape) for p in parameters])
    return [
        parameter.new_empty((support_x.shape[0], *shape) if rate.numel() else 0)
        for parameter, rate, shape in zip(parameters, rates, shapes, strict=True)
    ]


def _fake_products(parameters: list[Tensor], vectors: list[Tensor], *_: Any) -> list[Tensor]:
    return [vector.new_empty(vector.shape if vector.numel() else 0) for vector in vectors]


def _refusal(op: str) -> Callable[..., NoReturn]:
    def refuse(ctx: Any, *_: Any) -> NoReturn:
        raise RuntimeError(f"innerloop::{op} cannot be differentiated: use engine='torch' or maml_loss")

    return refuse


register_fake("maml", _fake)
torch.library.register_autograd("innerloop::maml", _backward, setup_context=_setup_context)
for _op, _fake_of_op in (("maml_adapt", _fake_adapted), ("hessian_vector_product", _fake_products)):
    register_fake(_op, _fake_of_op)
    torch.library.register_autograd(f"innerloop::{_op}", _refusal(_op), setup_context=lambda ctx, inputs, output: None)
