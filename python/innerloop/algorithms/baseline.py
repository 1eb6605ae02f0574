"""Baseline: supervised pre-training and a linear probe."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from innerloop.linear_probe import check_probe, fit_probe
from innerloop.models import Shape, output_shape
from innerloop.pretraining import PretrainedEmbedding


class Baseline(PretrainedEmbedding):
    """Baseline: pre-train on all training classes, then fit a linear classifier to each task (Chen et al. 2019).

    In train() it learns to tell all training classes apart by a linear classifier (the paper's section 3, training
    stage). In eval() the embedding is fixed and each support set gets a new linear classifier (fine-tuning stage):
    gradient descent as in the paper, but on the whole support set at every step and from zero weights, so that nothing
    is random. No gradient flows through that fit.

    Args:
        model: an embedding, [N, ...] to [N, ...].
        input_shape: of one sample.
        training_classes: number of classes to pre-train on.
        probe_steps: gradient steps on a support set.
        probe_lr: size of these steps.
        weight_decay: of the classifier fitted to a support set.
    """

    def __init__(
        self,
        model: nn.Module,
        input_shape: Shape,
        training_classes: int,
        probe_steps: int = 100,
        probe_lr: float = 0.05,
        weight_decay: float = 1e-3,
    ) -> None:
        check_probe(probe_steps, probe_lr, weight_decay)
        super().__init__(model, nn.Linear(math.prod(output_shape(model, input_shape)), training_classes))
        self.probe_steps = probe_steps
        self.probe_lr = probe_lr
        self.weight_decay = weight_decay

    def classify(
        self,
        support: Tensor,
        support_y: Tensor,
        query: Tensor,
        ways: int,
        support_mask: Tensor | None = None,
    ) -> Tensor:
        tasks, _, dim = support.shape
        start = (support.new_zeros(tasks, dim, ways), support.new_zeros(tasks, 1, ways))
        weight, bias = fit_probe(
            _linear,
            start,
            support,
            support_y,
            support_mask,
            steps=self.probe_steps,
            lr=self.probe_lr,
            weight_decay=self.weight_decay,
        )
        return _linear(query, weight, bias)


def _linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return torch.baddbmm(bias, x, weight)
