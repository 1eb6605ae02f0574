"""Strategies of hypothesis that change arguments of sound calls: shapes, strides, dtypes, devices, layouts, sizes
beyond any memory, values that are no numbers, labels out of range, integers of the encoded Program, things that are no
tensors.

What is drawn is data, a :class:`Case`: hypothesis prints it, and makes it smaller for as long as the fault stays.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from hypothesis import reject
from hypothesis import strategies as st
from torch import Tensor, nn

from reliability.sound_calls import Call

# The first of what can be chosen is the simplest, which hypothesis tries to keep to.
HUGE = (2**31, 2**33, 2**40, 2**62)
INTEGERS = (0, 1, -1, 2, 3, -2, 7, 2**31, 2**32 + 1, 2**62, 2**63 - 1, -(2**31), -(2**63))
FLOATS = (float("nan"), float("inf"), -float("inf"), 0.0, -1.0, 1e-310, 1e300)
DTYPES = (
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64),
    *(torch.int32, torch.int64, torch.uint8, torch.bool),
)
STRINGS = ("", "no such", "mse", "cosine", "dot", "euclidean", "support", "running", "torch")


class Odd:
    """No number, no tensor, no list."""

    def __repr__(self) -> str:
        return "Odd()"


ODD_THINGS = (None, 3, 2.5, "x", [], [1, 2], {}, np.zeros(2), Odd())
#: In the place of None.
OPTIONAL = ("1", torch.zeros(()), torch.ones(2, 6, dtype=torch.bool))


@dataclass(frozen=True)
class Change:
    """A function of the argument as it was, and what else it takes."""

    function: Callable[..., Any]
    parameters: tuple[Any, ...] = ()

    def __call__(self, value: Any) -> Any:
        return self.function(not_huge(value), *self.parameters)

    def __repr__(self) -> str:
        return f"{self.function.__name__}({', '.join(map(repr, self.parameters))})"


def not_huge(value: Any) -> Any:
    """What a change before made huge is not changed again, which would take hours."""
    if isinstance(value, Tensor) and value.numel() > 100_000:
        reject()
    return value


EVERY_TENSOR = "every tensor"


@dataclass(frozen=True)
class Case:
    """An unsound call: its op, which of the op's sound calls it was, and changes by argument."""

    call: Call
    which: int
    changes: list[tuple[str, Change]]

    def arguments(self) -> dict[str, Any]:
        """With the changes made, in their order; hypothesis goes on to another case where one cannot be made: a size
        beyond 64 bits, a sparse tensor as an array, an entry of no list, …"""
        result = dict(self.call.arguments)
        try:
            for place, change in self.changes:
                for name in result if place == EVERY_TENSOR else [place]:
                    result[name] = change(result[name])
        except (RuntimeError, TypeError, ValueError, AttributeError, LookupError, ZeroDivisionError):
            reject()
        return result

    def __repr__(self) -> str:
        changes = ", ".join(f"{name} {change}" for name, change in self.changes)
        return f"{self.call.name} (sound call {self.which}): {changes}"


@st.composite
def cases(draw: st.DrawFn, calls: Mapping[str, list[Call]]) -> Case:
    """Of every op as many."""
    group = draw(st.sampled_from(list(calls.values())))
    which = draw(st.integers(0, len(group) - 1))
    return Case(group[which], which, draw(st.lists(changes_of(group[which]), min_size=1, max_size=5)))


@st.composite
def changes_of(draw: st.DrawFn, call: Call) -> tuple[str, Change]:
    names = list(call.arguments)
    if "program" in names:
        names += ["program"] * len(names)
    name = draw(st.sampled_from([*names, EVERY_TENSOR]))
    if name == EVERY_TENSOR:
        return name, draw(size_changes(call))
    return name, draw(argument_changes(name, call.arguments[name]))


@st.composite
def size_changes(draw: st.DrawFn, call: Call) -> Change:
    """A size that some tensors have in common becomes another in all of them."""
    members = [value if isinstance(value, (list, tuple)) else [value] for value in call.arguments.values()]
    tensors = [tensor for group in members for tensor in group if isinstance(tensor, Tensor)]
    size = draw(st.sampled_from(sorted({size for tensor in tensors for size in tensor.shape})))
    # A look at each of so many labels would take hours: only what holds none becomes huge.
    counted = any(size in tensor.shape for tensor in tensors if not tensor.is_floating_point())
    return Change(size_becomes, (size, draw(st.sampled_from([0, 1, size + 1, 17, *(() if counted else HUGE)]))))


@st.composite
def argument_changes(draw: st.DrawFn, name: str, value: Any) -> Change:
    if draw(st.integers(0, 31)) == 31:
        return draw(change(becomes, st.sampled_from(ODD_THINGS)))
    if isinstance(value, Tensor):
        return draw(tensor_changes(value.shape, value.dtype))
    if name == "program":
        return draw(code_changes(len(value)))
    if isinstance(value, (list, tuple)):
        if not value or draw(st.booleans()):
            return draw(list_changes(len(value)))
        place = draw(st.integers(0, len(value) - 1))
        return Change(member, (place, draw(argument_changes(name, value[place]))))
    return draw(PLAIN[type(value)])


def change(function: Callable[..., Any], *parameters: st.SearchStrategy[Any]) -> st.SearchStrategy[Change]:
    return st.builds(Change, st.just(function), st.tuples(*parameters))


def becomes(value: Any, other: Any) -> Any:
    return other


def negated(value: bool) -> bool:
    return not value


PLAIN: dict[type, st.SearchStrategy[Change]] = {
    bool: change(negated),
    int: change(becomes, st.sampled_from(INTEGERS)),
    float: change(becomes, st.sampled_from(FLOATS)),
    str: change(becomes, st.sampled_from(STRINGS)),
    type(None): change(becomes, st.sampled_from(OPTIONAL)),
}


# --- lists ----------------------------------------------------------------------------------------


def member(values: list[Any], place: int, change: Change) -> list[Any]:
    return [change(value) if index == place else value for index, value in enumerate(values)]


def put(values: list[Any], place: int, value: int) -> list[Any]:
    return [*values[:place], value, *values[place + 1 :]]


def added(values: list[Any], place: int, difference: int) -> list[Any]:
    return put(values, place, min(max(values[place] + difference, -(2**63)), 2**63 - 1))


def dropped(values: list[Any], place: int) -> list[Any]:
    return [*values[:place], *values[place + 1 :]]


def repeated(values: list[Any], place: int, count: int) -> list[Any]:
    return [*values[:place], *values[place : place + count], *values[place:]]


def cut(values: list[Any], place: int) -> list[Any]:
    return list(values[:place])


def swapped(values: list[Any], place: int, other: int) -> list[Any]:
    return put(put(values, place, values[other]), other, values[place])


@cache
def list_changes(length: int) -> st.SearchStrategy[Change]:
    place = st.integers(0, max(length - 1, 0))
    return change(dropped, place) | change(repeated, place, st.integers(1, 8)) | change(cut, place)


@cache
def code_changes(length: int) -> st.SearchStrategy[Change]:
    """Of the encoded Program."""
    place = st.integers(0, length - 1)
    value = change(put, place, st.sampled_from(INTEGERS))
    near = change(added, place, st.integers(-3, 3))
    others = list_changes(length) | change(swapped, place, place)
    return st.sampled_from([value, near, others]).flatmap(lambda strategy: strategy)  # one_of would make six of three


# --- tensors --------------------------------------------------------------------------------------

DIMS: dict[str, Callable[[Tensor], Tensor]] = {
    "one more in front": lambda tensor: tensor[None],
    "one more behind": lambda tensor: tensor[..., None],
    "one": lambda tensor: tensor.flatten(),
    "summed": lambda tensor: tensor.sum(0),
}
STRIDES: dict[str, Callable[[Tensor, int], Tensor]] = {
    "reversed": lambda tensor, dim: tensor.flip(dim),
    "as if transposed": lambda tensor, dim: tensor.transpose(0, dim).contiguous().transpose(0, dim),
    "every other": lambda tensor, dim: tensor.repeat_interleave(2, dim)[(slice(None),) * dim + (slice(None, None, 2),)],
    "transposed": lambda tensor, dim: tensor.transpose(0, dim),
    "0": lambda tensor, dim: resized(tensor, dim, 1).expand(tensor.shape) if tensor.shape[dim] else tensor,
    "with an offset": lambda tensor, dim: torch.cat([tensor.flatten()[:1], tensor.flatten()])[1:].view(tensor.shape),
}
KINDS: dict[str, Callable[[Tensor], Any]] = {
    "meta": lambda tensor: tensor.to("meta"),
    "sparse": lambda tensor: tensor.to_sparse(),
    "negative view": lambda tensor: torch._neg_view(tensor),
    "requires grad": lambda tensor: tensor.clone().requires_grad_(tensor.is_floating_point()),
    "array": lambda tensor: tensor.numpy(force=True),
    "parameter": lambda tensor: nn.Parameter(tensor.detach(), requires_grad=False),
}


def cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype)


def dims(tensor: Tensor, which: str) -> Tensor:
    return DIMS[which](tensor)


def strides(tensor: Tensor, dim: int, which: str) -> Tensor:
    return STRIDES[which](tensor, dim)


def kind(tensor: Tensor, which: str) -> Any:
    return KINDS[which](tensor)


def resized(tensor: Tensor, dim: int, size: int) -> Tensor:
    """With as many entries along a dimension; repeated, and where there are too many for memory, the first one's."""
    if tensor.shape[dim] == 0:
        return tensor.new_zeros([*tensor.shape[:dim], min(size, 17), *tensor.shape[dim + 1 :]])
    if size > 1000:
        return tensor.narrow(dim, 0, 1).expand([*tensor.shape[:dim], size, *tensor.shape[dim + 1 :]])
    return tensor.index_select(dim, torch.arange(size) % tensor.shape[dim])


def size_becomes(value: Any, size: int, new: int) -> Any:
    """Of every tensor in a list too."""
    if isinstance(value, (list, tuple)):
        return [size_becomes(member, size, new) for member in value]
    if isinstance(value, Tensor):
        for dim in range(value.dim()):
            if value.shape[dim] == size:
                value = resized(not_huge(value), dim, new)
    return value


def entry(tensor: Tensor, place: int, value: Any) -> Tensor:
    tensor = tensor.clone()
    tensor.view(-1)[place] = value
    return tensor


def filled(tensor: Tensor, value: Any) -> Tensor:
    return torch.full_like(tensor, value)


@cache
def tensor_changes(shape: torch.Size, dtype: torch.dtype) -> st.SearchStrategy[Change]:
    values = st.sampled_from(FLOATS if dtype.is_floating_point else (False, True) if dtype == torch.bool else INTEGERS)
    changes = [
        change(cast, st.sampled_from(DTYPES)),
        change(dims, st.sampled_from(list(DIMS))),
        change(kind, st.sampled_from(list(KINDS))),
        change(filled, values),
    ]
    if shape.numel():
        changes.append(change(entry, st.integers(0, shape.numel() - 1), values))
    if shape:
        dim = st.integers(0, len(shape) - 1)
        changes.append(change(strides, dim, st.sampled_from(list(STRIDES))))
        changes.append(change(resized, dim, st.sampled_from(HUGE)))
        changes.append(
            dim.flatmap(
                lambda dim: change(resized, st.just(dim), st.sampled_from([0, 1, shape[dim] + 1, 2 * shape[dim], 17]))
            )
        )
    return st.one_of(changes)
