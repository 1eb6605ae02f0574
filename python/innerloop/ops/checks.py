"""What the checked functions of the ops ask of their arguments, in a user's words."""

from __future__ import annotations

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float64)


def check_float(tensor: Tensor, name: str, shape: str, dims: int) -> None:
    """A float32 or float64 tensor with that many dimensions; shape is how the message spells them."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
    if tensor.dtype not in FLOATS:
        raise TypeError(f"{name} has dtype {tensor.dtype}, expected float32 or float64")
    if tensor.dim() != dims:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {shape}")


def check_like(tensor: Tensor, name: str, other: Tensor, other_name: str) -> None:
    """The other's dtype and device."""
    if tensor.dtype != other.dtype:
        raise TypeError(f"{name} has dtype {tensor.dtype}, expected {other_name}'s {other.dtype}")
    if tensor.device != other.device:
        raise ValueError(f"{name} is on {tensor.device}, expected {other_name}'s device {other.device}")
