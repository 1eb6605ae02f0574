"""HF-MAML with the exact Hessian, as an innerloop plug-in."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from innerloop import Algorithm, Result, TaskBatch, primitives


class HFMAML(Algorithm):
    """HF-MAML: MAML's one step with its Hessian as a product with a vector (Fallah et al. 2020).

    A task's meta-gradient is (I − α H_support(θ)) ∇L_query(θ − α ∇L_support(θ)). The paper takes a difference of two
    gradients for the product of H and a vector; this is the product itself.

    Args:
        model: any module; its outputs are logits, or the targets' shape for regression.
        inner_lr: α, the step size of the inner loop.
        bn: BatchNorm statistics: "transductive" of the batch at hand, "support" of the support set, "running".
    """

    def __init__(
        self,
        model: nn.Module,
        inner_lr: float = 0.4,
        bn: Literal["transductive", "support", "running"] = "transductive",
    ) -> None:
        super().__init__(model)
        self.inner_lr = inner_lr
        self.bn = bn

    def options(self, targets: Tensor) -> dict[str, Any]:
        return {"bn": self.bn, "loss": "mse" if targets.is_floating_point() else "cross_entropy"}

    def forward(self, tasks: TaskBatch) -> Result:
        options = self.options(tasks.support_y)
        adapted = primitives.adapt(self.model, tasks, inner_lr=self.inner_lr, **options)
        v, result = primitives.meta_gradient(self.model, tasks, parameters=adapted, **options)
        if not torch.is_grad_enabled():  # evaluation
            return result
        hv = primitives.hessian_vector_product(self.model, tasks, v, **options)
        return primitives.with_gradient(result, self.model, {name: v[name] - self.inner_lr * hv[name] for name in v})

    def adapt(self, support_x: Tensor, support_y: Tensor) -> nn.Module:
        options = self.options(support_y)
        return primitives.learner(self.model, support_x, support_y, inner_lr=self.inner_lr, **options)
