"""Derivatives of the native ops, stated once for autograd, torch.func, forward mode and torch.compile."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils import _pytree as pytree

Arguments = tuple[Any, ...]


def transforms_active() -> bool:
    """Whether a torch.func transform or a forward-mode level is active: an op registered with torch.library is then
    differentiated wrongly or not at all, and the autograd.Function takes its place."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def differentiable(
    name: str,
    *,
    fake: Callable[..., Any],
    setup_context: Callable[[Any, Arguments, Any], None],
    backward: Callable[..., Any],
    jvp: Callable[..., Any],
    in_tasks: Callable[[Arguments, Arguments, int], Arguments],
) -> Callable[..., Any]:
    """Make ``torch.ops.innerloop.<name>`` differentiable and return what the rest of the package calls.

    Args:
        name: of the op, whose schema and kernels the native libraries hold.
        fake: shapes and dtypes of the outputs, for torch.compile.
        setup_context: (ctx, arguments, output); saves for backward and, with save_for_forward, for jvp.
        backward: (ctx, *gradients) → a gradient for each argument, or None; itself differentiable.
        jvp: (ctx, *tangents) → tangent of the output; itself differentiable.
        in_tasks: (arguments, their batch dimensions, batch size) → arguments with a batch dimension of torch.func.vmap
            folded into the leading dimension, tasks, which every op has.
    """
    op = getattr(torch.ops.innerloop, name).default
    qualified = f"innerloop::{name}"
    torch.library.register_fake(qualified, fake)
    torch.library.register_autograd(
        qualified, backward, setup_context=lambda ctx, inputs, output: setup_context(ctx, inputs, output)
    )

    def batched(info: Any, dims: Arguments, *arguments: Any) -> tuple[Any, Any]:
        size = info.batch_size
        output = op(*in_tasks(arguments, dims, size))
        unfolded = pytree.tree_map(lambda out: out.unflatten(0, (size, -1)) if len(out) else _empty(out, size), output)
        return unfolded, pytree.tree_map(lambda _: 0, output)

    torch.library.register_vmap(qualified, batched)

    class Function(torch.autograd.Function):
        """The op on flat tensors, as autograd.Function wants them."""

        generate_vmap_rule = True

        @staticmethod
        def forward(spec: pytree.TreeSpec, *leaves: Any) -> Any:
            output = op(*pytree.tree_unflatten(leaves, spec))
            return tuple(output) if isinstance(output, list) else output

        @staticmethod
        def setup_context(ctx: Any, inputs: Arguments, output: Any) -> None:
            spec, *leaves = inputs
            ctx.listed = isinstance(output, tuple) and _returns_list(op)
            setup_context(ctx, tuple(pytree.tree_unflatten(leaves, spec)), output)

        @staticmethod
        def backward(ctx: Any, *gradients: Any) -> Any:
            results = backward(ctx, list(gradients)) if ctx.listed else backward(ctx, *gradients)
            results = results if isinstance(results, tuple) else (results,)
            return None, *pytree.tree_leaves(results)

        @staticmethod
        def jvp(ctx: Any, _: Any, *tangents: Any) -> Any:
            result = jvp(ctx, *tangents)
            return tuple(result) if isinstance(result, list) else result

    def call(*arguments: Any) -> Any:
        if torch.compiler.is_compiling() or not transforms_active():
            return op(*arguments)
        leaves, spec = pytree.tree_flatten(arguments)
        output = Function.apply(spec, *leaves)
        return list(output) if _returns_list(op) else output

    return call


def fold(tensor: Tensor, dim: int | None, size: int) -> Tensor:
    """A tensor [.., T, ..] of a vmapped call as [size * T, ..]."""
    tensor = tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
    return tensor.flatten(0, 1)


def _empty(out: Tensor, size: int) -> Tensor:
    return out.reshape(size, 0, *out.shape[1:])


def _returns_list(op: Any) -> bool:
    return str(op._schema.returns[0].type) == "List[Tensor]"
