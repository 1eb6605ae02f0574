"""Model-Agnostic Meta-Learning."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from innerloop import engine as engines
from innerloop.contract import Algorithm, Result
from innerloop.functional import FunctionalModel
from innerloop.inner_loop import BatchNormMode, InnerLoop, InnerLR
from innerloop.inner_optimizers import InnerOptimizer
from innerloop.losses import Loss
from innerloop.native_engine import inner_loop
from innerloop.tasks import TaskBatch


class MAML(Algorithm):
    """MAML: an initialisation that a few gradient steps adapt to a task (Finn et al. 2017).

    Minimises the query loss after K steps of gradient descent on the support set, the paper's algorithm 1 and 2, with
    the exact meta-gradient; ``first_order`` drops the second derivatives (its section 5.2).

    Args:
        model: any module; its outputs are logits, or the targets' shape for regression.
        inner_lr: α, the step size of the inner loop: 0.4 is for images, sinusoids need 0.01.
        inner_steps: K, gradient steps on the support set.
        first_order: drop the second derivatives (FOMAML).
        bn: BatchNorm statistics: "transductive" of the batch at hand, "support" of the support set, "running".
        loss: "cross_entropy", "mse", or a callable; None chooses by the targets.
        step_weights: weights of the query loss before adaptation and after each step; None: the last alone.
        support_weight: weight of the support loss before adaptation in the meta-loss.
        inner_optimizer: what makes a step of the gradients: "sgd", or on the torch engine "momentum", "adam".
        engine: "auto", "native" or "torch".
    """

    training_defaults: ClassVar = {"steps": 3000, "meta_batch_size": 8, "queries": 5, "clip": 10.0}
    model_defaults: ClassVar = {"conv4": {"filters": 32, "downsample": "stride"}}

    def __init__(
        self,
        model: nn.Module,
        inner_lr: InnerLR = 0.4,
        inner_steps: int = 1,
        first_order: bool = False,
        bn: BatchNormMode = "transductive",
        loss: Loss | None = None,
        step_weights: Sequence[float] | None = None,
        support_weight: float = 0.0,
        engine: engines.Engine = "auto",
        inner_optimizer: InnerOptimizer = "sgd",
    ) -> None:
        super().__init__(model)
        self.inner_lr = inner_lr
        self.inner_steps = inner_steps
        self.first_order = first_order
        self.bn = bn
        self.loss = loss
        self.step_weights = step_weights
        self.support_weight = support_weight
        self.inner_optimizer = inner_optimizer
        self.engine = engines.check_engine(engine)
        self.inner_loop(classification=True)  # refuses bad options here, not at the first step
        if engine == "native":
            engines.check_lowers(model)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "inner_lr":
            # A compiled step reads a number from a tensor, so that another number is no reason to compile again.
            is_number = isinstance(value, (int, float))
            self._inner_lr_tensor = torch.tensor(float(value), dtype=torch.float64) if is_number else None
        super().__setattr__(name, value)

    def adapted(self) -> list[str] | None:
        """Names, prefixes or patterns of the parameters that the inner loop adapts; None: all."""
        return None

    def learning_rates(self) -> InnerLR:
        """α as :func:`innerloop.maml_loss` takes it."""
        number = self._inner_lr_tensor
        return self.inner_lr if number is None or not torch.compiler.is_compiling() else number

    def inner_loop(self, classification: bool) -> InnerLoop:
        """The inner loop as the options stand now."""
        # Evaluation may change inner_steps; weights for other steps say nothing then, and the last step counts.
        weights = self.step_weights
        if weights is not None and len(weights) != self.inner_steps + 1 and not torch.is_grad_enabled():
            weights = None
        return inner_loop(
            self.model,
            inner_lr=self.learning_rates(),
            inner_steps=self.inner_steps,
            step_weights=weights,
            support_weight=self.support_weight,
            adapt=self.adapted(),
            first_order=self.first_order,
            bn=self.bn,
            loss=self.loss or ("cross_entropy" if classification else "mse"),
            inner_optimizer=self.inner_optimizer,
        )

    def forward(self, tasks: TaskBatch) -> Result:
        inner = self.inner_loop(tasks.is_classification)
        return engines.meta_result(self.model, tasks, inner, engine=self.engine)

    def adapt(self, support_x: Tensor, support_y: Tensor) -> nn.Module:
        inner = self.inner_loop(not support_y.is_floating_point())
        adapted = engines.adapt(self.model, support_x, support_y, inner, self.engine)
        return FunctionalModel(self.model, inner.bn).as_module(adapted, support_x, inner.steps)
