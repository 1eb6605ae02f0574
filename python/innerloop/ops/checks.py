"""What the checked functions of the ops ask of their arguments, in a user's words."""

from __future__ import annotations

import math
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float64)


def check_tensor(tensor: Tensor, name: str) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")


def check_float(tensor: Tensor, name: str) -> None:
    check_tensor(tensor, name)
    if tensor.dtype not in FLOATS:
        lowered = tensor.dtype in (torch.float16, torch.bfloat16) and torch.is_autocast_enabled(tensor.device.type)
        remedy = f": autocast made it; give {name}.float()" if lowered else ""
        raise TypeError(f"{name} has dtype {tensor.dtype}, expected float32 or float64{remedy}")


def check_dims(tensor: Tensor, name: str, shape: str) -> None:
    """As many dimensions as shape, the way the message spells them, has names: "[T, S, D]"; no size beyond 2³¹."""
    if tensor.dim() != shape.count(",") + 1:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {shape}")
    if any(size >= 2**31 for size in tensor.shape):
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected sizes of at most 2³¹ − 1")


def has_kernel(op: str, tensor: Tensor) -> bool:
    """A CUDA tensor needs the op's CUDA kernel, which not every op and not every installation has."""
    on_cuda = tensor.device.type == "cuda"
    return not on_cuda or torch._C._dispatch_has_kernel_for_dispatch_key(f"innerloop::{op}", "CUDA")


def check_kernel(op: str, tensor: Tensor, name: str) -> None:
    if not has_kernel(op, tensor):
        raise ValueError(
            f"{name} is on {tensor.device}, but this installation has no CUDA kernel of {op}: move it to the CPU"
        )


def check_number(value: Any, name: str) -> None:
    """Also one that torch.compile does not know yet, or in a 0-d tensor."""
    if not isinstance(value, (int, float, Real, torch.SymInt, torch.SymFloat)) and not (
        isinstance(value, Tensor) and value.dim() == 0
    ):
        raise TypeError(f"{name} is of type {type(value).__name__}, expected a number")


def is_finite(value: Any) -> bool:
    """math.isfinite, also of a number that torch.compile does not know yet."""
    return bool(-math.inf < value < math.inf)


def check_finite(value: Any, name: str) -> None:
    check_number(value, name)
    if not is_finite(value):
        raise ValueError(f"{name} is {value!r}, expected a finite number")


def check_positive(value: Any, name: str) -> None:
    check_number(value, name)
    if not value > 0:
        raise ValueError(f"{name} is {value}, expected a positive number")


def check_integer(value: Any, name: str) -> None:
    is_integer = isinstance(value, (int, Integral, torch.SymInt))
    if not is_integer:
        raise TypeError(f"{name} is of type {type(value).__name__}, expected an integer")


def check_num_classes(num_classes: Any) -> None:
    check_integer(num_classes, "num_classes")
    if not 0 <= num_classes < 2**31:
        raise ValueError(f"num_classes is {num_classes}, expected 0 … 2³¹ − 1")


def check_mask(mask: Tensor, name: str, shape: torch.Size) -> None:
    check_tensor(mask, name)
    if mask.dtype != torch.bool or mask.shape != shape:
        raise ValueError(f"{name} is {mask.dtype} of shape {tuple(mask.shape)}, expected bool of shape {tuple(shape)}")


def check_like(tensor: Tensor, name: str, other: Tensor, other_name: str) -> None:
    """The other's dtype and device."""
    if tensor.dtype != other.dtype:
        raise TypeError(f"{name} has dtype {tensor.dtype}, expected {other_name}'s {other.dtype}")
    if tensor.device != other.device:
        raise ValueError(f"{name} is on {tensor.device}, expected {other_name}'s device {other.device}")


def check_same_space(queries: Tensor, points: Tensor, points_name: str, shape: str) -> None:
    """queries [T, Q, D] and points of shape, say "[T, N, D]", in the same tasks and dimensions."""
    check_float(queries, "queries")
    check_dims(queries, "queries", "[T, Q, D]")
    check_float(points, points_name)
    check_dims(points, points_name, shape)
    check_like(points, points_name, queries, "queries")
    if points.shape[0] != queries.shape[0] or points.shape[2] != queries.shape[2]:
        raise ValueError(
            f"{points_name} has shape {tuple(points.shape)}, "
            f"expected {shape} with T = {queries.shape[0]} and D = {queries.shape[2]} as queries has"
        )


def checked_labels(
    labels: Tensor,
    name: str,
    samples: Tensor,
    samples_name: str,
    shape: str,
    num_classes: int,
    mask: Tensor | None,
    mask_name: str = "mask",
) -> Tensor:
    """The labels of samples of shape, say "[T, S]", -1 where mask is False: a label that counts nowhere."""
    check_tensor(labels, name)
    if labels.dtype != torch.int64:
        raise TypeError(f"{name} has dtype {labels.dtype}, expected int64")
    if labels.shape != samples.shape[:2]:
        raise ValueError(f"{name} has shape {tuple(labels.shape)}, expected {shape} = {tuple(samples.shape[:2])}")
    if labels.device != samples.device:
        raise ValueError(f"{name} is on {labels.device}, expected {samples_name}'s device {samples.device}")
    check_num_classes(num_classes)
    if mask is not None:
        check_mask(mask, mask_name, labels.shape)
    if values_are_known(labels) and not _all_within(labels, num_classes):
        wrong = (labels < 0) | (labels >= num_classes)
        places = (wrong if mask is None else wrong & mask).nonzero()
        if len(places):
            task, sample = places[0].tolist()
            raise ValueError(
                f"{name} holds {int(labels[task, sample])} in task {task}, "
                f"expected 0 … {num_classes - 1} (num_classes - 1)"
            )
    return labels if mask is None else torch.where(mask, labels, -1)


def _all_within(labels: Tensor, num_classes: int) -> bool:
    """Of whole batches, in a fourth of the time that finding the place of a wrong one takes."""
    if labels.numel() == 0:
        return True
    least, most = torch.stack(labels.aminmax()).tolist()  # at once: a GPU is waited for a single time
    return bool(least >= 0 and most < num_classes)


def check_every_class(labels: Tensor, name: str, num_classes: int) -> None:
    """At least one sample of each class in each task; labels as checked_labels returns them."""
    if not values_are_known(labels):
        return
    present = torch.zeros(len(labels), num_classes + 1, dtype=torch.bool, device=labels.device)
    present.scatter_(1, torch.where(labels < 0, num_classes, labels), True)
    empty = (~present[:, :num_classes]).nonzero()
    if len(empty):
        task, missing = empty[0].tolist()
        raise ValueError(f"{name} has no sample of class {missing} in task {task}")


def values_are_known(tensor: Tensor) -> bool:
    """Not so of a tensor under torch.compile, where a look at values would break the graph, or under torch.func.vmap.
    There the CPU's kernels check what they must, and for CUDA's a label out of range is of no class."""
    return not (torch.compiler.is_compiling() or torch._C._functorch.is_functorch_wrapped_tensor(tensor))
