"""Baseline++: supervised pre-training and a cosine classifier."""

from __future__ import annotations

import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from innerloop.linear_probe import check_probe, fit_probe
from innerloop.models import Shape, output_shape
from innerloop.ops import prototypes
from innerloop.pretraining import PretrainedEmbedding


class BaselinePP(PretrainedEmbedding):
    """Baseline++: pre-train with a cosine classifier, then fit one to each task (Chen et al. 2019).

    The logits are scaled cosine similarities of the embedding and a weight vector for each class (the paper's section
    3), in pre-training and in the classifier that each support set gets in eval(). That one starts from the classes'
    mean directions and takes the whole support set at every step, where the paper starts at random and takes
    minibatches: nothing is random. No gradient flows through that fit.

    Args:
        model: an embedding, [N, ...] to [N, ...].
        input_shape: of one sample.
        training_classes: number of classes to pre-train on.
        scale: cosine similarities are multiplied by it.
        probe_steps: gradient steps on a support set.
        probe_lr: size of these steps.
        weight_decay: of the classifier fitted to a support set.
    """

    def __init__(
        self,
        model: nn.Module,
        input_shape: Shape,
        training_classes: int,
        scale: float = 10.0,
        probe_steps: int = 100,
        probe_lr: float = 0.05,
        weight_decay: float = 1e-3,
    ) -> None:
        check_probe(probe_steps, probe_lr, weight_decay)
        if not scale > 0:
            raise ValueError(f"scale is {scale}, expected a positive number")
        super().__init__(model, CosineClassifier(math.prod(output_shape(model, input_shape)), training_classes, scale))
        self.scale = scale
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
        logits = partial(scaled_cosines, scale=self.scale)
        (weight,) = fit_probe(
            logits,
            [prototypes(F.normalize(support.detach(), dim=2), support_y, ways, mask=support_mask)],
            support,
            support_y,
            support_mask,
            steps=self.probe_steps,
            lr=self.probe_lr,
            weight_decay=self.weight_decay,
        )
        return logits(query, weight)


class CosineClassifier(nn.Module):
    """Scaled cosine similarities to a learned vector for each class.

    Args:
        dim: of an embedding. classes: their number. scale: see :func:`scaled_cosines`.
    """

    def __init__(self, dim: int, classes: int, scale: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(F.normalize(torch.randn(classes, dim), dim=1))
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        return scaled_cosines(x, self.weight, self.scale)


def scaled_cosines(x: Tensor, weight: Tensor, scale: float) -> Tensor:
    """scale · cos(x, weight) of embeddings x [..., M, D] and weights [..., N, D]: [..., M, N]."""
    return scale * F.normalize(x, dim=-1) @ F.normalize(weight, dim=-1).mT
