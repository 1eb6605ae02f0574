"""Attention and recurrent kernels that have no second derivative: found, and others put in their place.

The fused kernels of F.scaled_dot_product_attention and cuDNN's recurrent layers can be differentiated once. The outer
gradient of an inner loop needs the second derivative too, and torch says only then that there is none.
"""

from __future__ import annotations

import threading
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

# What the autograd nodes of these kernels are called, after which comes the variant. On a CPU, oneDNN's recurrent
# kernel has a second derivative.
_ONCE_DIFFERENTIABLE = (
    "ScaledDotProductFlashAttention",
    "ScaledDotProductEfficientAttention",
    "ScaledDotProductCudnnAttention",
    "ScaledDotProductFusedAttention",
    "CudnnRnn",
    "MiopenRnn",
)


class SecondOrderWarning(UserWarning):
    """A model's kernels have no second derivative; slower ones that have one take their place in its inner loop.

    Given once for a model. ``first_order=True`` needs no second derivative and keeps the kernels.
    """


def once_differentiable(outputs: Tensor, inputs: Iterable[Tensor] = ()) -> list[str]:
    """The kernels without a second derivative that outputs were computed by from inputs, by their nodes' names."""
    found: set[str] = set()
    seen: set[Any] = {tensor.grad_fn for tensor in inputs}
    waiting = [outputs.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node.name().startswith(_ONCE_DIFFERENTIABLE):
            found.add(node.name())
        waiting += [before for before, _ in node.next_functions]
    return sorted(found)


class Kernels:
    """The kernels that a copy of a model runs with.

    Args:
        model: what was copied; what is found out about it is kept for its next copy. module: the copy.
        second_order: whether its passes are differentiated twice.
    """

    def __init__(self, model: nn.Module, module: nn.Module, second_order: bool) -> None:
        self._model = model
        self._second_order = second_order
        self._recurrent = [part for part in module.modules() if isinstance(part, nn.RNNBase)]

    @property
    def switched(self) -> bool:
        return self._second_order and self._model in _switched

    def must_repeat(self, outputs: Tensor, inputs: Iterable[Tensor]) -> bool:
        """Whether a pass from inputs to outputs lacks a second derivative, and needs to be done again with the kernels
        that :meth:`chosen` has from then on."""
        if not self._second_order or self._model in _switched:
            return False
        found = once_differentiable(outputs, inputs)
        if not found:
            return False
        _switched.add(self._model)
        warnings.warn(
            f"{type(self._model).__name__}: {', '.join(found)} has no second derivative. Its inner loop runs with "
            "attention's math kernel, and with recurrent layers without cuDNN, which are slower and take more memory; "
            "first_order=True needs no second derivative",
            SecondOrderWarning,
            stacklevel=2,
        )
        return True

    def chosen(self) -> AbstractContextManager[Any]:
        """Within this a pass runs with kernels that have the derivatives that it needs."""
        stack = ExitStack()
        if self.switched:
            stack.enter_context(_MATH_ATTENTION)
        if self._recurrent and torch.is_grad_enabled():
            # In eval mode cuDNN's have no derivative at all.
            stack.enter_context(_without_cudnn([r for r in self._recurrent if self.switched or not r.training]))
        return stack


_switched: weakref.WeakSet[nn.Module] = weakref.WeakSet()


class _Shared:
    """A context manager of settings of the whole process, for threads that are in it at the same time.

    The first to enter makes the settings, the last to leave ends them.

    Args:
        make: makes the context manager.
    """

    def __init__(self, make: Callable[[], AbstractContextManager[Any]]) -> None:
        self._make = make
        self._lock = threading.Lock()
        self._inside = 0
        self._settings = ExitStack()

    def __enter__(self) -> None:
        with self._lock:
            if self._inside == 0:
                self._settings.enter_context(self._make())
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                self._settings.close()


_MATH_ATTENTION = _Shared(lambda: sdpa_kernel(SDPBackend.MATH))
_WITHOUT_CUDNN = _Shared(lambda: torch.backends.cudnn.flags(enabled=False))


@contextmanager
def _without_cudnn(layers: Sequence[nn.RNNBase]) -> Iterator[None]:
    """Within this the layers, and nothing else of a model, run without cuDNN."""

    def run(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with _WITHOUT_CUDNN:
            return forward(*args, **kwargs)

    own = [vars(layer).get("forward") for layer in layers]
    for layer in layers:
        layer.forward = partial(run, layer.forward)
    try:
        yield
    finally:
        for layer, forward in zip(layers, own, strict=True):
            del layer.forward
            if forward is not None:
                layer.forward = forward
