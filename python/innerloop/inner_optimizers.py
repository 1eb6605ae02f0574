"""What an inner step makes of the gradients so far: the optimizers of the inner loop, differentiable."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

InnerOptimizer = Literal["sgd", "momentum", "adam"]

# torch.optim's defaults, and for momentum what everybody takes.
MOMENTUM = 0.9
BETA_1, BETA_2, EPSILON = 0.9, 0.999, 1e-8


class Directions:
    """The state of an optimizer through one inner loop: θₖ₊₁ = θₖ − αₖ ⊙ dₖ, with dₖ of the gradients g₀ … gₖ.

    "sgd": dₖ = gₖ. "momentum": dₖ = 0.9 dₖ₋₁ + gₖ, torch.optim.SGD's. "adam": dₖ = m̂ₖ / (√v̂ₖ + 1e-8), Kingma and Ba
    2015, algorithm 1, with β of 0.9 and 0.999. dₖ is differentiable in all gradients, to any order.
    """

    def __init__(self, optimizer: InnerOptimizer) -> None:
        self.optimizer = optimizer
        self._steps: dict[str, int] = {}
        self._means: dict[str, Tensor] = {}
        self._squares: dict[str, Tensor] = {}

    def next(self, name: str, gradient: Tensor) -> Tensor:
        """dₖ of the parameter of that name, of its gradient's shape."""
        if self.optimizer == "sgd":
            return gradient
        if self.optimizer == "momentum":
            before = self._means.get(name)
            self._means[name] = gradient if before is None else MOMENTUM * before + gradient
            return self._means[name]
        step = self._steps[name] = self._steps.get(name, 0) + 1
        mean = BETA_1 * self._means.get(name, 0.0) + (1 - BETA_1) * gradient
        square = BETA_2 * self._squares.get(name, 0.0) + (1 - BETA_2) * gradient.square()
        self._means[name], self._squares[name] = mean, square
        return mean / (1 - BETA_1**step) / (_root(square / (1 - BETA_2**step)) + EPSILON)


def _root(square: Tensor) -> Tensor:
    """√v with the derivative 0 at 0, where autograd's is infinite and makes a NaN of 0 · ∞.

    v is 0 where all gradients so far were 0. Then m is 0 too, and what reaches √v is multiplied by m: 0 is the exact
    derivative of dₖ by that way, and 1/ε times m's all there is.
    """
    is_positive = square > 0
    return torch.where(is_positive, torch.where(is_positive, square, 1.0).sqrt(), 0.0)
