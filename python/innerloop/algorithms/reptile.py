"""Reptile."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import torch
from torch import nn

from innerloop import engine as engines
from innerloop.algorithms.maml import MAML
from innerloop.contract import Result
from innerloop.inner_loop import BatchNormMode
from innerloop.inner_optimizers import InnerOptimizer
from innerloop.losses import Loss
from innerloop.ops.maml import with_gradients
from innerloop.tasks import TaskBatch


class Reptile(MAML):
    """Reptile: move the initial parameters towards the adapted ones (Nichol et al. 2018, algorithm 2).

    ``.loss`` is the mean support loss before adaptation. Its backward does not differentiate it: it yields the mean
    over tasks of θ₀ − θ_K, the paper's direction, for any outer optimizer. Query sets are only looked at to report.

    Args:
        model: any module; its outputs are logits, or the targets' shape for regression.
        inner_lr: α, the step size of the inner loop.
        inner_steps: K, gradient steps on the support set; with one, the direction is α times that of joint training.
        bn: BatchNorm statistics: "transductive" of the batch at hand, "support" of the support set, "running".
        loss: "cross_entropy", "mse", or a callable; None chooses by the targets.
        inner_optimizer: what makes a step of the gradients: "sgd", or on the torch engine "momentum", "adam".
        engine: "auto", "native" or "torch".
    """

    training_defaults: ClassVar = {**MAML.training_defaults, "shots": 5}

    def __init__(
        self,
        model: nn.Module,
        inner_lr: float = 0.1,
        inner_steps: int = 5,
        bn: BatchNormMode = "transductive",
        loss: Loss | None = None,
        engine: engines.Engine = "auto",
        inner_optimizer: InnerOptimizer = "sgd",
    ) -> None:
        super().__init__(model, inner_lr, inner_steps, bn=bn, loss=loss, engine=engine, inner_optimizer=inner_optimizer)

    def forward(self, tasks: TaskBatch) -> Result:
        inner = self.inner_loop(tasks.is_classification)
        with torch.no_grad():
            adapted = engines.adapt_tasks(self.model, tasks, inner, engine=self.engine)
            fixed = replace(inner, steps=0, step_weights=(1.0,))
            after = engines.meta_result(self.model, tasks, fixed, adapted, self.engine)
            before = engines.meta_result(
                self.model, tasks, replace(fixed, step_weights=(0.0,), support_weight=1.0), engine=self.engine
            )
        parameters = {name: p for name, p in self.model.named_parameters() if p.requires_grad and name in inner.rates}
        directions = [p.detach() - adapted[name].mean(0) for name, p in parameters.items()]
        loss = with_gradients(before.loss, directions, list(parameters.values()))
        return Result(loss, before.task_losses, after.logits, after.task_accuracies)
