"""Losses and accuracies, a value per task: means over a task's valid samples."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

#: A callable maps (outputs [N, *out], targets [N, ...]) of one task to its 0-d mean loss.
Loss = Literal["cross_entropy", "mse"] | Callable[[Tensor, Tensor], Tensor]


def check_targets(outputs: Tensor, targets: Tensor, name: str = "query_y") -> None:
    """Refuse what a loss would broadcast or read out of bounds: outputs [T, N, C, *dense] with labels [T, N, *dense],
    or outputs and floating-point targets of exactly one shape.

    Raises:
        ValueError: shapes that differ; the message names them.
    """
    expected = outputs.shape if targets.is_floating_point() else outputs.shape[:2] + outputs.shape[3:]
    if targets.shape != expected:
        raise ValueError(
            f"{name} has shape {tuple(targets.shape)}, expected {tuple(expected)} "
            f"for outputs of shape {tuple(outputs.shape)}"
        )


def loss_per_task(outputs: Tensor, targets: Tensor, mask: Tensor | None, loss: Loss) -> Tensor:
    """Mean loss of each task, [T].

    Args:
        outputs: [T, N, C, *dense] logits, or [T, N, *out]. targets: [T, N, *dense] int64, or as outputs.
        mask: [T, N] bool, False for padding; None: all valid.
        loss: "cross_entropy", "mse", or a callable on one task's (outputs, targets).
    """
    check_targets(outputs, targets)
    if callable(loss):
        valid = [slice(None)] * len(outputs) if mask is None else list(mask)
        return torch.stack([loss(o[keep], y[keep]) for o, y, keep in zip(outputs, targets, valid, strict=True)])
    if loss == "cross_entropy":
        if mask is not None:  # a padded sample's label is not read: 0 is a label every head has
            targets = torch.where(_beside(mask, targets), targets, 0)
        losses = F.cross_entropy(outputs.flatten(0, 1), targets.flatten(0, 1), reduction="none")
    else:
        if targets.shape != outputs.shape:  # torch would spread the one over the other
            raise ValueError(
                f"loss is 'mse' and targets have shape {list(targets.shape)}, expected the outputs' "
                f"{list(outputs.shape)}"
            )
        losses = F.mse_loss(outputs, targets, reduction="none").flatten(0, 1)
    losses = losses.reshape(*outputs.shape[:2], -1).mean(dim=2)
    return _mean(losses, mask)


def accuracy_per_task(outputs: Tensor, targets: Tensor, mask: Tensor | None) -> Tensor:
    """Share of each task's valid samples whose largest output is the label's, [T], detached."""
    right = (outputs.detach().argmax(dim=2) == targets).to(outputs.dtype)
    return _mean(right.flatten(2).mean(dim=2) if right.dim() > 2 else right, mask)


def _beside(mask: Tensor, targets: Tensor) -> Tensor:
    return mask.reshape(*mask.shape, *[1] * (targets.dim() - 2))


def _mean(values: Tensor, mask: Tensor | None) -> Tensor:
    """Mean over the valid samples of values [T, N]; what a padded sample holds, NaN included, does not matter."""
    if mask is None:
        return values.mean(dim=1)
    return torch.where(mask, values, 0).sum(dim=1) / mask.sum(dim=1)
