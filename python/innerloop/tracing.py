"""torch.fx tracing of a model's forward, with everything refused that plain fx would pass over in silence.

fx runs forward once with a stand-in for the input and records what is done with it. What does not go through the
stand-in it cannot see: gradients turned off, random choices, state written, `x += y` on memory that another name
shares. All of that is refused here, so that a graph means what the module does.
"""

from __future__ import annotations

import operator
import random
import sys
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any

import numpy as np
import torch
import torch.fx
from torch import Tensor, nn
from torch.fx.proxy import TraceError

#: In-place operators that a stand-in records as they are.
IN_PLACE_OPERATORS = {
    "__iadd__": operator.iadd,
    "__isub__": operator.isub,
    "__imul__": operator.imul,
    "__itruediv__": operator.itruediv,
}


class NotLowerable(ValueError):
    """A model that has no Program.

    Attributes:
        path: of the layer, as model.get_submodule takes it; "" is the model itself.
        what: the layer or function. why: it cannot be lowered. remedy: what to do.
    """

    def __init__(self, path: str, what: str, why: str, remedy: str) -> None:
        super().__init__(path, what, why, remedy)  # all of them, so that the exception can be copied and pickled
        self.path, self.what, self.why, self.remedy = path, what, why, remedy

    def __str__(self) -> str:
        place = f"layer {self.path!r}" if self.path else "the model"
        return f"{place} does not lower: {self.what}: {self.why}. {self.remedy[:1].upper()}{self.remedy[1:]}."


def trace(
    model: nn.Module, is_layer: Callable[[nn.Module], bool]
) -> tuple[torch.fx.Graph, list[tuple[nn.Module, str]]]:
    """(the graph of model(x), the counters that forward wrote as (module, attribute)).

    Every node's meta["path"] is the module whose forward made it. Modules are called "model.PATH" in the graph.

    Args:
        model: is run once, and may be written to: hand in a copy. is_layer: modules that are not traced into.

    Raises:
        NotLowerable: forward does what a graph does not show.
    """
    before = _GeneratorStates()
    for _ in range(3):
        try:
            return _trace(model, is_layer)
        except _NumbersDrawn as error:  # perhaps by another thread: they share the generators
            drawn = error
    before.put_back()
    raise drawn


def _trace(
    model: nn.Module, is_layer: Callable[[nn.Module], bool]
) -> tuple[torch.fx.Graph, list[tuple[nn.Module, str]]]:
    tracer = _Tracer(is_layer)
    before = {module: _state(module) for module in model.modules()}
    with _one_at_a_time, torch.enable_grad(), torch.autocast("cpu", enabled=False), _NoRandomNumbers():
        try:
            graph = tracer.trace(_Whole(model))
        except NotLowerable:
            raise
        except TraceError as error:
            why = f"what it does depends on the input ({_first_line(error)})"
            raise NotLowerable(tracer.path, "control flow in forward", why, "decide outside of forward") from error
        except Exception as error:
            why = f"{type(error).__name__}: {_first_line(error)}"
            raise NotLowerable(
                tracer.path, "a forward that torch.fx cannot trace", why, "rewrite it, or use engine='torch'"
            ) from error
    paths = {module: path for path, module in model.named_modules()}
    counters = []
    for module, state in before.items():
        for name in _changed(state, _state(module)):
            if not _is_number(vars(module).get(name)) or not _is_number(state.get(name, (None,))[0]):
                written = "a buffer" if name == "_buffers" else f"self.{name}"
                why = f"forward writes {written}, and the native engine keeps no state"
                raise NotLowerable(paths[module], type(module).__name__, why, "keep state out of forward")
            counters.append((module, name))
    return graph, counters


# fx replaces methods of nn.Module while it traces; _Tracer lets other threads through.
_one_at_a_time = threading.Lock()


class _Whole(nn.Module):
    """Calls a model with its input alone: other arguments of its forward have their defaults."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)


def _in_place(function: Callable[..., Any]) -> Callable[[Any, Any], Any]:
    def method(self: Any, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    return method


class _Value(torch.fx.Proxy):
    """fx's stand-in for a tensor. It tells `x += y` from `x = x + y`, and stops a forward that asks for its type:
    isinstance(x, Tensor) would be false, and the forward would do what it never does."""

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        asking = sys._getframe(1).f_globals.get("__name__", "")
        if asking.startswith("torch.") or asking == __name__:
            return _Value
        why = "forward asks for the type of a tensor (isinstance), and there is none while it is traced"
        assert isinstance(self.tracer, _Tracer)
        raise NotLowerable(self.tracer.path, "isinstance", why, "remove the question, or use engine='torch'")


for _name, _function in IN_PLACE_OPERATORS.items():
    setattr(_Value, _name, _in_place(_function))


class _Tracer(torch.fx.Tracer):
    def __init__(self, is_layer: Callable[[nn.Module], bool]) -> None:
        super().__init__()
        self.proxy_buffer_attributes = True  # a buffer that forward reads or writes shows in the graph
        self.is_layer = is_layer
        self.thread = threading.get_ident()
        self.path = ""  # of the module whose forward runs

    def proxy(self, node: torch.fx.Node) -> torch.fx.Proxy:
        return _Value(node, self)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return self.is_layer(m)

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if threading.get_ident() != self.thread:
            return forward(*args, **kwargs)
        outside = self.path
        self.path = self.path_of_module(m).removeprefix("model").removeprefix(".")
        result = super().call_module(m, forward, args, kwargs)
        self.path = outside  # after an error it stays, and says where
        return result

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        if threading.get_ident() != self.thread:
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def create_node(self, *args: Any, **kwargs: Any) -> torch.fx.Node:
        if not torch.is_grad_enabled():
            why = "forward turns gradients off there (torch.no_grad, or an autograd.Function of its own)"
            raise NotLowerable(self.path, str(args[1]), why, "freeze parameters by adapt= or requires_grad_ instead")
        if torch.is_autocast_enabled("cpu"):
            raise NotLowerable(self.path, str(args[1]), "forward uses autocast there", "leave it out of forward")
        node = super().create_node(*args, **kwargs)
        node.meta["path"] = self.path
        return node


class _NumbersDrawn(NotLowerable):
    """Random numbers were drawn while a model was traced."""


class _GeneratorStates:
    """Of all random numbers without an owner, at the time it is made."""

    def __init__(self) -> None:
        self.python, self.numpy, self.torch = random.getstate(), _numpy_state(), torch.get_rng_state()

    def have_changed(self) -> bool:
        return (
            random.getstate() != self.python
            or str(_numpy_state()) != str(self.numpy)
            or not torch.equal(torch.get_rng_state(), self.torch)
        )

    def put_back(self) -> None:
        random.setstate(self.python)
        np.random.set_state(self.numpy)  # noqa: NPY002 (see _numpy_state)
        torch.set_rng_state(self.torch)


class _NoRandomNumbers:
    """Refuses a trace that drew random numbers: its choice would stand for all calls. After another error the
    generators are put back."""

    def __enter__(self) -> None:
        self.before = _GeneratorStates()

    def __exit__(self, kind: type[BaseException] | None, *_: BaseException | TracebackType | None) -> None:
        if not self.before.have_changed():
            return
        if kind is None:
            why = "every call would have to draw anew"
            raise _NumbersDrawn("", "random numbers in forward", why, "use engine='torch'")
        self.before.put_back()


def _numpy_state() -> Any:
    """Of the global generator, which a user's forward may draw from."""
    return np.random.get_state()  # noqa: NPY002 (the legacy one is the one without an owner)


def _state(module: nn.Module) -> dict[str, tuple[Any, Any]]:
    """Every attribute with what it holds, to be compared by identity."""
    return {name: (value, _contents(value)) for name, value in vars(module).items()}


def _contents(value: Any) -> list[tuple[int, Any]]:
    if isinstance(value, dict):
        items = list(value.values())
    elif isinstance(value, (list, tuple, set)):
        items = list(value)
    else:
        items = [value]
    return [(id(item), _version(item)) for item in items]


def _version(item: Any) -> int | None:
    """How often a tensor was written to; tensors made under torch.inference_mode do not count it."""
    return item._version if isinstance(item, Tensor) and not item.is_inference() else None


def _changed(before: dict[str, tuple[Any, Any]], after: dict[str, tuple[Any, Any]]) -> list[str]:
    return [
        name
        for name in {**before, **after}
        if name not in before
        or name not in after
        or before[name][0] is not after[name][0]
        or before[name][1] != after[name][1]
    ]


def _is_number(value: Any) -> bool:
    return type(value) in (int, float)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0]
