"""iMAML."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor, nn

from innerloop import engine as engines
from innerloop import primitives
from innerloop.algorithms.maml import MAML
from innerloop.contract import Algorithm, Result
from innerloop.inner_loop import BatchNormMode
from innerloop.losses import Loss
from innerloop.native_engine import inner_loop
from innerloop.tasks import TaskBatch

log = logging.getLogger("innerloop")


class IMAML(Algorithm):
    """iMAML: the meta-gradient by implicit differentiation, whatever the inner loop's path (Rajeswaran et al. 2019).

    The inner loop descends on L_support(φ) + λ/2 ‖φ − θ‖² (section 2.2 of the paper). Where it has converged, the
    meta-gradient is the x that solves (I + H/λ) x = ∇L_query(φ), H being the Hessian of the support loss at φ
    (lemma 1); a few steps of conjugate gradients solve it (algorithm 2). Memory does not grow with the inner steps.

    Conjugate gradients need I + H/λ to be positive definite, which it is where φ is a minimum: many small inner steps
    get there, few or large ones do not. A task on which they meet negative curvature keeps the solution so far, and
    where that is none yet, ∇L_query(φ), which is FOMAML's. :attr:`negative_curvature` says on which tasks of the latest
    batch that happened; :attr:`stopped` of :attr:`solved` tasks had it since the algorithm was made, which the log
    "innerloop" says when it is 1, 10, 100 … of them.

    Args:
        model: any module; its outputs are logits, or the targets' shape for regression.
        inner_lr: α, the step size of the inner loop.
        inner_steps: K, gradient steps on the support set.
        proximal: λ, how strongly the inner loop is held to the initial parameters.
        cg_steps: steps of conjugate gradients.
        bn: BatchNorm statistics: "transductive" of the batch at hand, "support" of the support set, "running".
        loss: "cross_entropy", "mse", or a callable; None chooses by the targets.
        engine: "auto", "native" or "torch".
    """

    training_defaults: ClassVar = MAML.training_defaults
    model_defaults: ClassVar = MAML.model_defaults

    def __init__(
        self,
        model: nn.Module,
        inner_lr: float = 0.05,
        inner_steps: int = 16,
        proximal: float = 0.5,
        cg_steps: int = 5,
        bn: BatchNormMode = "transductive",
        loss: Loss | None = None,
        engine: engines.Engine = "auto",
    ) -> None:
        super().__init__(model)
        if not (math.isfinite(proximal) and proximal > 0):
            raise ValueError(f"proximal is {proximal!r}, expected a positive number: the solution divides by it")
        if cg_steps < 1:
            raise ValueError(f"cg_steps is {cg_steps!r}, expected at least 1")
        self.inner_lr = inner_lr
        self.inner_steps = inner_steps
        self.proximal = proximal
        self.cg_steps = cg_steps
        self.bn = bn
        self.loss = loss
        self.engine = engines.check_engine(engine)
        #: [T] bool, of the latest batch that gradients were computed for.
        self.negative_curvature = torch.zeros(0, dtype=torch.bool)
        self.stopped = 0
        self.solved = 0
        # Refuses bad options here, not at the first step.
        inner_loop(model, inner_lr=inner_lr, inner_steps=inner_steps, bn=bn, loss=self.loss_for(True))
        if engine == "native":
            engines.check_lowers(model)

    def loss_for(self, classification: bool) -> Loss:
        """The loss for targets of that kind."""
        return self.loss or ("cross_entropy" if classification else "mse")

    def forward(self, tasks: TaskBatch) -> Result:
        loss = self.loss_for(tasks.is_classification)
        adapted = primitives.adapt(
            self.model, tasks, inner_lr=self.inner_lr, inner_steps=self.inner_steps, proximal=self.proximal,
            bn=self.bn, loss=loss, engine=self.engine,
        )  # fmt: skip
        gradients, result = primitives.meta_gradient(
            self.model, tasks, parameters=adapted, bn=self.bn, loss=loss, engine=self.engine
        )
        if not torch.is_grad_enabled() or not gradients:
            return result

        shapes = {name: gradient.shape for name, gradient in gradients.items()}

        def regularised(x: Tensor) -> Tensor:
            """(I + H/λ) x"""
            products = primitives.hessian_vector_product(
                self.model, tasks, _unflatten(x, shapes), parameters=adapted, bn=self.bn, loss=loss, engine=self.engine
            )
            return x + _flatten(products) / self.proximal

        x, negative = conjugate_gradients(regularised, _flatten(gradients), self.cg_steps)
        self._report(negative)
        return primitives.with_gradient(result, self.model, _unflatten(x, shapes))

    def adapt(self, support_x: Tensor, support_y: Tensor) -> nn.Module:
        return primitives.learner(
            self.model, support_x, support_y, inner_lr=self.inner_lr, inner_steps=self.inner_steps,
            proximal=self.proximal, bn=self.bn, loss=self.loss_for(not support_y.is_floating_point()),
            engine=self.engine,
        )  # fmt: skip

    def _report(self, negative: Tensor) -> None:
        self.negative_curvature = negative
        before = self.stopped
        self.stopped += int(negative.sum())
        self.solved += len(negative)
        if len(str(self.stopped)) > len(str(before)) or (self.stopped > 0 and before == 0):
            log.warning(
                "iMAML: conjugate gradients met negative curvature on %d of %d tasks so far and stopped there: the "
                "inner loop does not reach a minimum; more inner_steps or a smaller inner_lr may",
                self.stopped,
                self.solved,
            )


def conjugate_gradients(product: Callable[[Tensor], Tensor], b: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """x with A_t x_t = b_t for every task t, by conjugate gradients from x = 0, all tasks at once.

    Args:
        product: x [T, P] → A x [T, P], each A_t symmetric. b: [T, P]. steps: at most so many products.

    Returns: (x [T, P]; [T] bool, the tasks that met a direction p with pᵀA p ≤ 0 and stopped before going along it;
        where it was the first one, x is b). A task whose residual is rounding noise has no further steps.
    """
    x, residual, direction = torch.zeros_like(b), b, b
    squared = (b * b).sum(1)
    least = squared * torch.finfo(b.dtype).eps ** 2
    going = squared != 0  # NaN goes on, and shows
    negative = torch.zeros_like(going)
    for step in range(steps):
        along = product(direction)
        curvature = (direction * along).sum(1)
        stops = going & (curvature <= 0)
        negative = negative | stops
        if step == 0:
            x = torch.where(stops[:, None], b, x)
        going = going & ~stops
        size = torch.where(going, squared / curvature, 0)[:, None]
        x = x + size * direction
        residual = residual - size * along
        before, squared = squared, (residual * residual).sum(1)
        going = going & ~(squared <= least)
        if not going.any():
            break
        direction = torch.where(going[:, None], residual + (squared / before)[:, None] * direction, 0)
    return x, negative


def _flatten(tensors: dict[str, Tensor]) -> Tensor:
    """[T, P] of [T, *shape] tensors."""
    return torch.cat([tensor.reshape(len(tensor), -1) for tensor in tensors.values()], dim=1)


def _unflatten(flat: Tensor, shapes: dict[str, torch.Size]) -> dict[str, Tensor]:
    parts = flat.split([shape[1:].numel() for shape in shapes.values()], dim=1)
    return {name: part.reshape(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}
