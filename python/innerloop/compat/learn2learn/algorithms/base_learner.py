"""What the wrappers share (learn2learn.algorithms.base_learner)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


class BaseLearner(nn.Module):
    """A module that stands for another: it calls it, and has its attributes.

    Args:
        module: the one wrapped.
    """

    module: nn.Module

    def __init__(self, module: nn.Module | None = None) -> None:
        super().__init__()
        self.module = module  # type: ignore[assignment]  # None, as learn2learn allows, is for a subclass to replace

    def __getattr__(self, attr: str) -> Any:
        try:
            return super().__getattr__(attr)
        except AttributeError:
            if attr == "module":  # not there yet: no module to ask
                raise
            return getattr(self.module, attr)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)


def inner_gradients(
    loss: Tensor, parameters: Sequence[Tensor], second_order: bool, allow_unused: bool
) -> tuple[Tensor | None, ...]:
    """∇loss for one inner step, as a graph of its own where the second order is wanted.

    Raises:
        RuntimeError: the loss does not depend on a parameter, or one requires no grad.
    """
    try:
        return torch.autograd.grad(
            loss, parameters, retain_graph=second_order, create_graph=second_order, allow_unused=allow_unused
        )
    except RuntimeError as error:
        raise RuntimeError(
            f"adapt cannot differentiate the loss in the module's parameters: {error} MAML's allow_unused=True leaves "
            "parameters alone that the loss does not depend on, allow_nograd=True those that require no grad."
        ) from error
