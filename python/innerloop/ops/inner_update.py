"""One gradient step of the inner loop for the parameters of all tasks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

import innerloop._library  # noqa: F401 (defines the ops)
from innerloop import reference
from innerloop.ops._differentiable import Arguments, differentiable, in_front
from innerloop.ops.checks import check_float, check_kernel, check_like, check_number, check_tensor


def inner_update(
    params: Sequence[Tensor], grads: Sequence[Tensor], lr: float | Tensor | Sequence[float | Tensor]
) -> list[Tensor]:
    """θ − α ⊙ g for every parameter of every task, out of place and in one call (Finn et al. 2017, equation 1).

    Differentiable in params, grads and lr to any order.

    Args:
        params: tensors [T, ...], float32 or float64. grads: tensors of the same shapes and dtypes.
        lr: α: a number or 0-d tensor for all, or one for each of params: a number, or a tensor that broadcasts to it.

    Returns: the updated tensors.

    Raises:
        TypeError, ValueError: numbers of tensors, shapes, dtypes or devices that do not fit together.

    Examples:
        >>> weights, gradients = torch.ones(2, 3), torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
        >>> innerloop.ops.inner_update([weights], [gradients], lr=0.5)
        [tensor([[ 0.5000,  0.0000, -0.5000],
                [-1.0000, -1.5000, -2.0000]])]
    """
    both: tuple[tuple[str, Any], ...] = (("params", params), ("grads", grads))
    for name, given in both:
        if isinstance(given, Tensor) or not isinstance(given, Iterable):
            raise TypeError(f"{name} is of type {type(given).__name__}, expected a list of tensors")
    params, grads = list(params), list(grads)
    if len(grads) != len(params):
        raise ValueError(f"grads has {len(grads)} tensors, expected {len(params)} as params has")
    for index, (param, grad) in enumerate(zip(params, grads, strict=True)):
        check_float(param, f"params[{index}]")
        check_tensor(grad, f"grads[{index}]")
        check_like(grad, f"grads[{index}]", param, f"params[{index}]")
        if grad.shape != param.shape:
            raise ValueError(f"grads[{index}] has shape {tuple(grad.shape)}, expected {tuple(param.shape)}")
    if isinstance(lr, (int, float)) or (isinstance(lr, Tensor) and lr.dim() == 0):
        lr = [lr] * len(params)
    if isinstance(lr, Tensor) or not isinstance(lr, Sequence) or len(lr) != len(params):
        raise ValueError(f"lr must be a number, a 0-d tensor, or one for each of the {len(params)} params")
    if not params:
        return []
    check_kernel("inner_update", params[0], "params[0]")
    updated: list[Tensor] = _inner_update(
        params, grads, [_rate(index, rate, param) for index, (rate, param) in enumerate(zip(lr, params, strict=True))]
    )
    return updated


def _rate(index: int, rate: float | Tensor, param: Tensor) -> Tensor:
    """α as the kernel takes it: one element, or an array of the parameter's shape."""
    if not isinstance(rate, Tensor):
        check_number(rate, f"lr[{index}]")
        return torch.full((), rate, dtype=param.dtype, device=param.device)
    check_like(rate, f"lr[{index}]", param, f"params[{index}]")
    if rate.dim() == 0 or rate.shape == param.shape:
        return rate
    try:
        return rate.expand_as(param)
    except RuntimeError:
        raise ValueError(
            f"lr[{index}] has shape {tuple(rate.shape)}, expected one that broadcasts to {tuple(param.shape)}"
        ) from None


def _fake(params: list[Tensor], grads: list[Tensor], lrs: list[Tensor]) -> list[Tensor]:
    return [param.new_empty(param.shape) for param in params]


def _setup(ctx: Any, arguments: Arguments, output: Any) -> None:
    _, grads, lrs = arguments
    ctx.save_for_backward(*grads, *lrs)
    ctx.save_for_forward(*grads, *lrs)


def _saved(ctx: Any) -> tuple[list[Tensor], list[Tensor]]:
    count = len(ctx.saved_tensors) // 2
    return list(ctx.saved_tensors[:count]), list(ctx.saved_tensors[count:])


def _backward(ctx: Any, gradients: list[Tensor]) -> Arguments:
    grads, lrs = _saved(ctx)
    for_grads = [-lr * upstream for lr, upstream in zip(lrs, gradients, strict=True)]
    for_lrs = [
        -(upstream * grad) if lr.dim() else -(upstream * grad).sum()
        for lr, grad, upstream in zip(lrs, grads, gradients, strict=True)
    ]
    return gradients, for_grads, for_lrs


def _jvp(ctx: Any, *tangents: Any) -> list[Tensor]:
    grads, lrs = _saved(ctx)
    count = len(grads)
    along_params, along_grads, along_lrs = (tangents[i * count : (i + 1) * count] for i in range(3))
    return [
        param - lr * along_grad - along_lr * grad
        for param, lr, along_grad, along_lr, grad in zip(along_params, lrs, along_grads, along_lrs, grads, strict=True)
    ]


def _batched(op: Callable[..., Any], arguments: Arguments, dims: Arguments, size: int) -> Any:
    """The op goes element by element: the batch dimension stays as one more, also of rates that differ over it."""
    folded: tuple[list[Tensor], ...] = ([], [], [])
    for param, grad, lr, param_dim, grad_dim, lr_dim in zip(*arguments, *dims, strict=True):
        param, grad = in_front(param, param_dim, size), in_front(grad, grad_dim, size)
        rate = lr
        if lr_dim is not None or lr.dim():
            rate = in_front(lr, lr_dim, size)
            rate = rate.reshape(*rate.shape, *[1] * (param.dim() - rate.dim())).expand_as(param)
        for tensors, tensor in zip(folded, (param, grad, rate), strict=True):
            tensors.append(tensor)
    return op(*folded)


_inner_update = differentiable(
    "inner_update",
    fake=_fake,
    setup_context=_setup,
    backward=_backward,
    jvp=_jvp,
    batched=_batched,
    twin=reference.inner_update,
)
