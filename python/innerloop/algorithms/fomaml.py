"""First-order MAML."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from innerloop.algorithms.maml import MAML
from innerloop.engine import Engine
from innerloop.inner_loop import BatchNormMode, InnerLR
from innerloop.inner_optimizers import InnerOptimizer
from innerloop.losses import Loss


class FOMAML(MAML):
    """First-order MAML: the meta-gradient without its second derivatives (Finn et al. 2017, section 5.2).

    The query loss's gradient at the adapted parameters is taken for the one at the initial parameters.

    Args:
        model: any module; its outputs are logits, or the targets' shape for regression.
        inner_lr: α, the step size of the inner loop.
        inner_steps: K, gradient steps on the support set.
        bn: BatchNorm statistics: "transductive" of the batch at hand, "support" of the support set, "running".
        loss: "cross_entropy", "mse", or a callable; None chooses by the targets.
        step_weights: weights of the query loss before adaptation and after each step; None: the last alone.
        support_weight: weight of the support loss before adaptation in the meta-loss.
        inner_optimizer: what makes a step of the gradients: "sgd", or on the torch engine "momentum", "adam".
        engine: "auto", "native" or "torch".
    """

    def __init__(
        self,
        model: nn.Module,
        inner_lr: InnerLR = 0.4,
        inner_steps: int = 1,
        bn: BatchNormMode = "transductive",
        loss: Loss | None = None,
        step_weights: Sequence[float] | None = None,
        support_weight: float = 0.0,
        engine: Engine = "auto",
        inner_optimizer: InnerOptimizer = "sgd",
    ) -> None:
        super().__init__(
            model, inner_lr, inner_steps, True, bn, loss, step_weights, support_weight, engine, inner_optimizer
        )
