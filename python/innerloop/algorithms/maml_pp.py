"""MAML++."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from innerloop.algorithms.maml import MAML
from innerloop.contract import Result
from innerloop.engine import Engine
from innerloop.functional import copy_structure
from innerloop.inner_loop import AnyBatchNormMode, InnerLoop, InnerLR
from innerloop.losses import Loss
from innerloop.norms import PerStepBatchNorm, is_batch_norm
from innerloop.tasks import TaskBatch


class MAMLPlusPlus(MAML):
    """MAML++: MAML made stable, with step sizes and BatchNorm of its own for each step (Antoniou et al. 2019).

    Section 4 of the paper: a multi-step loss, whose weights move from all steps alike to the last one; first-order
    gradients early in training; a learned step size, which may become negative, for each parameter tensor and step;
    BatchNorm statistics, γ and β for each step; and a cosine schedule of the outer learning rate, which is in
    ``training_defaults``. Details are those of the authors' code (AntreasAntoniou/HowToTrainYourMAMLPytorch): the outer
    loop learns γ and β, and the inner loop never adapts them; per-step BatchNorm normalises with the statistics of the
    batch at hand in evaluation too, and the running statistics that training collects are not read.

    Steps beyond those trained with are all taken like the last.

    Args:
        model: any module; its outputs are logits, or the targets' shape for regression. It is trained; its BatchNorm
            layers alone stay as they are with bn="per_step", which replaces them in ``self.model``.
        inner_lr: what every α starts as.
        inner_steps: K, gradient steps on the support set, at least 1.
        multi_step_share: share of training, from its start, in which the query loss after every step counts.
        first_order_share: share of training, from its start, without second derivatives.
        bn: BatchNorm statistics: "per_step", "transductive" of the batch at hand, "support" of the support set,
            "running". With "per_step", the torch engine runs models that have BatchNorm.
        loss: "cross_entropy", "mse", or a callable; None chooses by the targets.
        engine: "auto", "native" or "torch".

    Attributes:
        training_steps: outer steps of the whole training; :func:`innerloop.fit` sets it.
        steps_done: how many of them are done: a buffer, counted by forward in train().
        rates: α, a vector [K] for each adapted parameter.
    """

    training_defaults: ClassVar = {**MAML.training_defaults, "steps": 1000, "schedule": "cosine"}

    def __init__(
        self,
        model: nn.Module,
        inner_lr: float = 0.1,
        inner_steps: int = 3,
        multi_step_share: float = 0.1,
        first_order_share: float = 0.3,
        bn: AnyBatchNormMode = "per_step",
        loss: Loss | None = None,
        engine: Engine = "auto",
    ) -> None:
        if not isinstance(inner_steps, int) or inner_steps < 1:
            raise ValueError(f"inner_steps is {inner_steps!r}, expected an integer of at least 1")
        for name, share in (("multi_step_share", multi_step_share), ("first_order_share", first_order_share)):
            if not 0 <= share <= 1:
                raise ValueError(f"{name} is {share}, expected a share of training, 0 … 1")
        if bn == "per_step":
            model = _with_per_step_norms(model, inner_steps)
        # MAML's own option leaves "per_step" out: its layers are made here.
        super().__init__(model, inner_lr, inner_steps, bn=bn, loss=loss, engine=engine)  # type: ignore[arg-type]
        self.multi_step_share = multi_step_share
        self.first_order_share = first_order_share
        self.training_steps = self.training_defaults["steps"]
        self.steps_done = nn.Buffer(torch.tensor(0))
        self.rates = nn.ParameterList(
            self.model.get_parameter(name).new_full((inner_steps,), inner_lr) for name in self.adapted()
        )

    def adapted(self) -> list[str]:
        """All parameters but BatchNorm's."""
        norms = [path for path, module in self.model.named_modules() if isinstance(module, _BatchNorm)]
        return [
            name
            for name, parameter in self.model.named_parameters()
            if parameter.requires_grad and name.rpartition(".")[0] not in norms
        ]

    def learning_rates(self) -> InnerLR:
        if "rates" not in self._modules:  # while the constructor checks its options
            return self.inner_lr
        rates = {}
        for name, rate in zip(self.adapted(), self.rates, strict=True):
            steps = torch.arange(self.inner_steps, device=rate.device).clamp(max=len(rate) - 1)
            shape = self.model.get_parameter(name).shape
            of_steps = rate[steps]
            # A vector of K numbers would not say whether it is one for each step or for each of K elements.
            is_ambiguous = of_steps.shape == shape
            rates[name] = of_steps[:, None].expand(-1, *shape) if is_ambiguous else of_steps
        return rates

    def inner_loop(self, classification: bool) -> InnerLoop:
        inner = super().inner_loop(classification)  # the last step's loss alone, second order
        if "rates" not in self._modules or not self._is_training_step():
            return inner
        progress = int(self.steps_done) / self.training_steps
        if progress < self.multi_step_share:
            inner = replace(inner, step_weights=step_weights(inner.steps, progress / self.multi_step_share))
        return replace(inner, first_order=progress < self.first_order_share, collecting=True)

    def forward(self, tasks: TaskBatch) -> Result:
        result = super().forward(tasks)
        if self._is_training_step():
            self.steps_done.add_(1)
        return result

    def _is_training_step(self) -> bool:
        return self.training and torch.is_grad_enabled()


def step_weights(steps: int, progress: float) -> tuple[float, ...]:
    """w of the multi-step loss, K + 1 numbers for θ₀ … θ_K that sum to 1 (section 4 of the paper; its numbers are those
    of the authors' code).

    Args:
        steps: K. progress: of the annealing, 0 … 1: from 1/K for each step to the last alone, but for a remainder of
            0.03/K for each of the others.
    """
    others = max(1 - progress, 0.03) / steps
    return (0.0, *[others] * (steps - 1), 1 - (steps - 1) * others)


def _with_per_step_norms(model: nn.Module, steps: int) -> nn.Module:
    """A copy of a model's structure with its parameters and PerStepBatchNorm in the place of BatchNorm."""

    def per_step(module: nn.Module) -> nn.Module | None:
        if not is_batch_norm(module):
            return None
        assert isinstance(module, _BatchNorm)
        return PerStepBatchNorm(module, steps)

    return copy_structure(model, per_step)[id(model)]
