"""Meta-SGD."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from innerloop.algorithms.maml import MAML
from innerloop.engine import Engine
from innerloop.inner_loop import BatchNormMode, InnerLR
from innerloop.losses import Loss


class MetaSGD(MAML):
    """Meta-SGD: MAML that learns a step size for every single parameter (Li et al. 2017).

    The inner step is θ − α ∘ ∇L with α of θ's shape, equation 3 of the paper; α is learned together with θ, equation 4,
    and may become negative.

    Args:
        model: any module; its outputs are logits, or the targets' shape for regression.
        inner_lr: what every α starts as. The paper draws them from 0.005 … 0.1.
        inner_steps: K, gradient steps on the support set; the paper takes one.
        first_order: drop the second derivatives of θ; the gradient of α has none.
        bn: BatchNorm statistics: "transductive" of the batch at hand, "support" of the support set, "running".
        loss: "cross_entropy", "mse", or a callable; None chooses by the targets.
        step_weights: weights of the query loss before adaptation and after each step; None: the last alone.
        support_weight: weight of the support loss before adaptation in the meta-loss.
        engine: "auto", "native" or "torch".
    """

    def __init__(
        self,
        model: nn.Module,
        inner_lr: float = 0.4,
        inner_steps: int = 1,
        first_order: bool = False,
        bn: BatchNormMode = "transductive",
        loss: Loss | None = None,
        step_weights: Sequence[float] | None = None,
        support_weight: float = 0.0,
        engine: Engine = "auto",
    ) -> None:
        super().__init__(model, inner_lr, inner_steps, first_order, bn, loss, step_weights, support_weight, engine)
        #: α of each of the model's parameters, in the order of model.parameters().
        self.rates = nn.ParameterList(torch.full_like(parameter, inner_lr) for parameter in model.parameters())

    def learning_rates(self) -> InnerLR:
        if "rates" not in self._modules:  # while the constructor checks its options
            return self.inner_lr
        # An α for all steps says so by its shape: a vector of K numbers could be one for each step.
        return {
            name: rate.expand(self.inner_steps, *rate.shape)
            for (name, _), rate in zip(self.model.named_parameters(), self.rates, strict=True)
        }
