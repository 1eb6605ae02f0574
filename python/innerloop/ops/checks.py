"""What the checked functions of the ops ask of their arguments, in a user's words."""

from __future__ import annotations

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float64)


def check_tensor(tensor: Tensor, name: str) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")


def check_float(tensor: Tensor, name: str) -> None:
    check_tensor(tensor, name)
    if tensor.dtype not in FLOATS:
        raise TypeError(f"{name} has dtype {tensor.dtype}, expected float32 or float64")


def check_dims(tensor: Tensor, name: str, shape: str) -> None:
    """As many dimensions as shape, the way the message spells them, has names: "[T, S, D]"."""
    if tensor.dim() != shape.count(",") + 1:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {shape}")


def check_kernel(op: str, tensor: Tensor, name: str) -> None:
    """A CUDA tensor needs the op's CUDA kernel, which not every op and not every installation has."""
    if tensor.device.type == "cuda" and not torch._C._dispatch_has_kernel_for_dispatch_key(f"innerloop::{op}", "CUDA"):
        raise ValueError(
            f"{name} is on {tensor.device}, but this installation has no CUDA kernel of {op}: move it to the CPU"
        )


def check_like(tensor: Tensor, name: str, other: Tensor, other_name: str) -> None:
    """The other's dtype and device."""
    if tensor.dtype != other.dtype:
        raise TypeError(f"{name} has dtype {tensor.dtype}, expected {other_name}'s {other.dtype}")
    if tensor.device != other.device:
        raise ValueError(f"{name} is on {tensor.device}, expected {other_name}'s device {other.device}")
