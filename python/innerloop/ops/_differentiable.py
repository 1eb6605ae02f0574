"""Derivatives of the native ops, stated once for autograd, torch.func, forward mode and torch.compile."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils import _pytree as pytree

Arguments = tuple[Any, ...]


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]  # torch gives it no types
def transforms_active() -> bool:
    """Whether a torch.func transform or a forward-mode level is active: an op registered with torch.library is then
    differentiated wrongly or not at all. The autograd.Function takes its place, and where torch.compile, which fails
    on that, traces the transform, the twin."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def register_fake(name: str, fake: Callable[..., Any]) -> None:
    """Say what shapes and dtypes the outputs of ``torch.ops.innerloop.<name>`` have, for torch.compile and meta."""
    arguments = getattr(torch.ops.innerloop, name).default._schema.arguments

    def checked(*values: Any) -> Any:
        for argument, value in zip(arguments, values, strict=True):
            if value is None and str(argument.type) == "Tensor":  # torch hands None on
                raise TypeError(f"{argument.name} is None, expected a tensor")
        return fake(*values)

    torch.library.register_fake(f"innerloop::{name}", checked)


def differentiable(
    name: str,
    *,
    fake: Callable[..., Any],
    setup_context: Callable[[Any, Arguments, Any], None],
    backward: Callable[..., Any],
    jvp: Callable[..., Any],
    batched: Callable[[Callable[..., Any], Arguments, Arguments, int], Any] | None = None,
    twin: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    """Make ``torch.ops.innerloop.<name>`` differentiable and return what the rest of the package calls.

    Args:
        name: of the op, whose schema and kernels the native libraries hold.
        fake: shapes and dtypes of the outputs, for torch.compile.
        setup_context: (ctx, arguments, output); saves for backward and, with save_for_forward, for jvp.
        backward: (ctx, *gradients) → a gradient for each argument, or None; itself differentiable.
        jvp: (ctx, *tangents) → tangent of the output; itself differentiable.
        batched: (op, arguments, their batch dimensions, batch size) → the op's output with the batch dimension of
            torch.func.vmap in front. None: the batch is more tasks, the leading dimension of all tensors.
        twin: the same in plain torch; an op that only backward functions call needs none.
    """
    op = getattr(torch.ops.innerloop, name).default
    qualified = f"innerloop::{name}"
    returns_list = str(op._schema.returns[0].type) == "List[Tensor]"
    register_fake(name, fake)
    torch.library.register_autograd(
        qualified, backward, setup_context=lambda ctx, inputs, output: setup_context(ctx, inputs, output)
    )

    batched = batched or _as_more_tasks

    def vmap_rule(function: Callable[..., Any], info: Any, dims: Arguments, *arguments: Any) -> tuple[Any, Any]:
        output = batched(function, arguments, dims, info.batch_size)
        return output, pytree.tree_map(lambda _: 0, output)

    torch.library.register_vmap(qualified, partial(vmap_rule, op))

    class Function(torch.autograd.Function):
        """The op on flat tensors, as autograd.Function wants them."""

        @staticmethod
        def forward(spec: pytree.TreeSpec, *leaves: Any) -> Any:
            output = op(*pytree.tree_unflatten(leaves, spec))
            return tuple(output) if returns_list else output

        @staticmethod
        def setup_context(ctx: Any, inputs: Arguments, output: Any) -> None:
            spec, *leaves = inputs
            setup_context(ctx, tuple(pytree.tree_unflatten(leaves, spec)), output)

        @staticmethod
        def backward(ctx: Any, *gradients: Any) -> Any:
            results = backward(ctx, list(gradients)) if returns_list else backward(ctx, *gradients)
            results = results if isinstance(results, tuple) else (results,)
            return None, *pytree.tree_leaves(results)

        @staticmethod
        def jvp(ctx: Any, _: Any, *tangents: Any) -> Any:
            result = jvp(ctx, *tangents)
            return tuple(result) if isinstance(result, list) else result

        @staticmethod
        def vmap(info: Any, dims: Arguments, spec: pytree.TreeSpec, *leaves: Any) -> tuple[Any, Any]:
            arguments = pytree.tree_unflatten(leaves, spec)
            output, out_dims = vmap_rule(call, info, pytree.tree_unflatten(dims[1:], spec), *arguments)
            return (tuple(output), tuple(out_dims)) if isinstance(output, list) else (output, out_dims)

    def call(*arguments: Any) -> Any:
        if not transforms_active():
            return op(*arguments)
        if torch.compiler.is_compiling():
            assert twin is not None
            return twin(*arguments)
        leaves, spec = pytree.tree_flatten(arguments)
        output = Function.apply(spec, *leaves)
        return list(output) if returns_list else output

    return call


def in_front(tensor: Tensor, dim: int | None, size: int) -> Tensor:
    """A tensor of a vmapped call with the batch dimension, or without one repeated, as the first."""
    return tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)


def _as_more_tasks(op: Callable[..., Any], arguments: Arguments, dims: Arguments, size: int) -> Any:
    folded = (
        in_front(argument, dim, size).flatten(0, 1) if isinstance(argument, Tensor) else argument
        for argument, dim in zip(arguments, dims, strict=True)
    )
    return pytree.tree_map(lambda out: out.unflatten(0, (size, len(out) // size)), op(*folded))
