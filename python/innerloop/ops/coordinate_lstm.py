"""The LSTM of a learned optimizer, for every coordinate of an optimizee."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor

import innerloop._library  # noqa: F401 (defines the ops)
from innerloop import reference
from innerloop.ops._differentiable import Arguments, register_fake, transforms_active
from innerloop.ops.checks import check_dims, check_float, check_integer, check_like, check_positive, has_kernel

MOST_P = 700.0  # eᵖ is a float64


def coordinate_lstm(
    gradients: Tensor,
    state: Tensor,
    first: Tensor,
    second: Tensor,
    output: Tensor,
    *,
    p: float = 10.0,
    averaged: int = 0,
    tasks: int = 1,
) -> tuple[Tensor, Tensor]:
    """K steps of the coordinate-wise LSTM optimizer (Andrychowicz et al. 2016, section 2.1 and figure 3).

    Each of C coordinates has a two-layer LSTM of H units of its own, and all share its weights. Its input is a
    coordinate's gradient g as (log|g|/p, sign g) where |g| ≥ e⁻ᵖ, and (−1, eᵖ g) elsewhere (appendix A); its output is
    the update, a linear function of the second layer's hidden state. Rows of a layer's weights are the gates in
    torch's order: input, forget, cell, output. Differentiable once in every tensor, in one pass back through all
    steps that keeps no activations; a second derivative raises. With averaged > 0, in forward mode, under torch.func
    and on a device without a kernel, where plain torch computes it, it is differentiable to any order.

    Args:
        gradients: of K steps, [K, C] float32 or float64.
        state: before the first of them, [4, H, C]: hidden and cell of the first layer, hidden and cell of the second;
            zeros at the start. All tensors are of gradients' dtype.
        first: [4H, 2 + H + 1], the first layer's weights for its input, for its hidden state, and its bias.
        second: [4H, H + H + 1], the second layer's.
        output: [H + 1], the weights of the update and its bias.
        p: of the preprocessing.
        averaged: global averaging cells (appendix B): so many units of each layer pass on the mean of their hidden
            state over the coordinates of a task. By plain torch.
        tasks: T, in which the coordinates are grouped, C / T each; averaged alone reads it.

    Returns: updates [K, C], and the state after the last step.

    Raises:
        TypeError, ValueError: dtypes, shapes or devices that do not fit together, or a number out of its range.
        RuntimeError: from backward, where the gradient is to be differentiated again.
    """
    _check(gradients, state, first, second, output, p)
    for name, number in (("averaged", averaged), ("tasks", tasks)):
        check_integer(number, name)
    if not 0 <= averaged <= state.shape[1]:
        raise ValueError(f"averaged is {averaged}, expected 0 … {state.shape[1]}, the hidden units")
    if tasks < 1 or gradients.shape[1] % tasks:
        raise ValueError(f"tasks is {tasks}, expected a divisor of the {gradients.shape[1]} coordinates of gradients")
    if averaged or transforms_active() or not has_kernel("coordinate_lstm", gradients):
        return reference.coordinate_lstm(gradients, state, first, second, output, p, averaged, tasks)
    result: tuple[Tensor, Tensor] = torch.ops.innerloop.coordinate_lstm(gradients, state, first, second, output, p)
    return result


def coordinate_lstm_weight_gradients(
    upstream: Tensor,
    gradients: Tensor,
    state: Tensor,
    weights: tuple[Tensor, Tensor, Tensor],
    *,
    p: float = 10.0,
    averaged: int = 0,
    tasks: int = 1,
) -> list[Tensor]:
    """The gradients of first, second and output from that of the updates, upstream [K, C], alone: detached, and without
    another forward pass before. The other arguments are those of :func:`coordinate_lstm`."""
    if averaged or not has_kernel("coordinate_lstm_backward", gradients):
        first, second, output = (weight.detach().requires_grad_() for weight in weights)
        with torch.enable_grad():
            updates, _ = reference.coordinate_lstm(gradients, state, first, second, output, p, averaged, tasks)
        return list(torch.autograd.grad(updates, (first, second, output), upstream))
    with torch.no_grad():
        found = torch.ops.innerloop.coordinate_lstm_backward(upstream, None, gradients, state, *weights, p, False)
    return list(found[:3])


def _check(gradients: Tensor, state: Tensor, first: Tensor, second: Tensor, output: Tensor, p: float) -> None:
    check_float(gradients, "gradients")
    check_dims(gradients, "gradients", "[K, C]")
    check_float(state, "state")
    check_dims(state, "state", "[4, H, C]")
    hidden, coordinates = state.shape[1], gradients.shape[1]
    if hidden < 1:
        raise ValueError(f"state has shape {tuple(state.shape)}, expected [4, H, C] with at least one hidden unit")
    expected = {
        "state": (state, "[4, H, C]", (4, hidden, coordinates)),
        "first": (first, "[4H, H + 3]", (4 * hidden, hidden + 3)),
        "second": (second, "[4H, 2H + 1]", (4 * hidden, 2 * hidden + 1)),
        "output": (output, "[H + 1]", (hidden + 1,)),
    }
    for name, (tensor, form, shape) in expected.items():
        check_float(tensor, name)
        check_like(tensor, name, gradients, "gradients")
        if tuple(tensor.shape) != shape:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}, expected {form} = {shape} "
                f"for {hidden} hidden units of state and {coordinates} coordinates of gradients"
            )
    check_positive(p, "p")
    if p > MOST_P:
        raise ValueError(f"p is {p}, expected at most {MOST_P}: beyond that eᵖ is no float64")


def _fake(
    gradients: Tensor, state: Tensor, first: Tensor, second: Tensor, output: Tensor, p: float
) -> tuple[Tensor, Tensor]:
    return gradients.new_empty(gradients.shape), state.new_empty(state.shape)


def _setup(ctx: Any, inputs: Arguments, output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.p = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, of_updates: Tensor | None, of_state: Tensor | None) -> tuple[Tensor | None, ...]:
    gradients, state, *weights = ctx.saved_tensors
    of_inputs = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
    if of_updates is None:
        of_updates = torch.zeros_like(gradients)
    first, second, output, of_gradients, of_start = torch.ops.innerloop.coordinate_lstm_backward(
        of_updates, of_state, gradients, state, *weights, ctx.p, of_inputs
    )
    inputs = (of_gradients, of_start) if of_inputs else (None, None)
    return *inputs, first, second, output, None


def _backward_fake(
    of_updates: Tensor,
    of_state: Tensor | None,
    gradients: Tensor,
    state: Tensor,
    first: Tensor,
    second: Tensor,
    output: Tensor,
    p: float,
    of_inputs: bool,
) -> tuple[Tensor, ...]:
    return (
        *(first.new_empty(first.shape), second.new_empty(second.shape), output.new_empty(output.shape)),
        gradients.new_empty(gradients.shape if of_inputs else (0, 0)),
        state.new_empty(state.shape if of_inputs else (0, 0, 0)),
    )


def _refuse(ctx: Any, *_: Any) -> NoReturn:
    raise RuntimeError(
        "the gradient of coordinate_lstm cannot be differentiated again (second-order meta-learning, a gradient "
        "penalty, a Hessian): innerloop.reference.coordinate_lstm is differentiable to any order"
    )


register_fake("coordinate_lstm", _fake)
torch.library.register_autograd("innerloop::coordinate_lstm", _backward, setup_context=_setup)
register_fake("coordinate_lstm_backward", _backward_fake)
torch.library.register_autograd(
    "innerloop::coordinate_lstm_backward", _refuse, setup_context=lambda ctx, inputs, output: None
)
