"""Fitting a classifier to the fixed embeddings of a support set, for a batch of tasks."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from innerloop.losses import loss_per_task


def fit_probe(
    logits: Callable[..., Tensor],
    start: Sequence[Tensor],
    support: Tensor,
    labels: Tensor,
    mask: Tensor | None = None,
    *,
    steps: int,
    lr: float,
    weight_decay: float,
) -> list[Tensor]:
    """Weights that minimise each task's mean cross entropy on its support set, by gradient descent.

    The momentum of 0.9 and dampening of 0.9 are those of Chen et al. 2019; every step takes the whole support set, so
    that nothing is drawn at random. Works under no_grad and inference_mode alike; no gradient flows through it.

    Args:
        logits: (embeddings [T, S, D], *weights) → [T, S, N]; one task's outputs depend on its own weights alone.
        start: the weights to begin with, [T, ...] each.
        support: [T, S, D]. labels: [T, S] int64. mask: [T, S] bool, False where a sample is padding; None: all valid.
        steps: of gradient descent. lr: their size. weight_decay: as in torch.optim.SGD.

    Returns: the weights, detached.
    """
    with torch.inference_mode(False), torch.enable_grad():
        x, labels = support.detach().clone(), labels.clone()  # tensors of inference_mode take part in no autograd graph
        mask = None if mask is None else mask.clone()
        weights = [weight.detach().clone().requires_grad_() for weight in start]
        optimizer = torch.optim.SGD(weights, lr=lr, momentum=0.9, dampening=0.9, weight_decay=weight_decay)
        for _ in range(steps):
            loss = loss_per_task(logits(x, *weights), labels, mask, "cross_entropy").sum()
            for weight, gradient in zip(weights, torch.autograd.grad(loss, weights), strict=True):
                weight.grad = gradient
            optimizer.step()
    return [weight.detach() for weight in weights]


def check_probe(steps: int, lr: float, weight_decay: float) -> None:
    """Refuse settings of a probe that make no sense."""
    if steps < 0:
        raise ValueError(f"probe_steps is {steps}, expected at least 0")
    if not lr > 0:
        raise ValueError(f"probe_lr is {lr}, expected a positive number")
    if not weight_decay >= 0:
        raise ValueError(f"weight_decay is {weight_decay}, expected at least 0")
