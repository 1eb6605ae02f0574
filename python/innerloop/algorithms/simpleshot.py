"""SimpleShot: nearest centroids of transformed embeddings."""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from innerloop.models import Shape, output_shape
from innerloop.ops import prototype_logits
from innerloop.pretraining import PretrainedEmbedding


class SimpleShot(PretrainedEmbedding):
    """SimpleShot: pre-train on all training classes; nearest mean of centred, normalised embeddings (Wang et al. 2019).

    In train() it learns to tell all training classes apart by a linear classifier, and keeps a running mean of the
    training embeddings. In eval() an embedding x becomes (x − mean) / ‖x − mean‖, and the logits are negative squared
    Euclidean distances to the class means.

    Args:
        model: an embedding, [N, ...] to [N, ...].
        input_shape: of one sample.
        training_classes: number of classes to pre-train on.
        transform: of the embeddings, in the paper's names: "cl2n" centres and normalises, "l2n" normalises, "un" leaves
            them: the nearest class mean.
    """

    #: Of the running mean of training embeddings: the weight of the newest batch, a tenth of BatchNorm's.
    MOMENTUM = 0.01

    def __init__(
        self,
        model: nn.Module,
        input_shape: Shape,
        training_classes: int,
        transform: Literal["cl2n", "l2n", "un"] = "cl2n",
    ) -> None:
        if transform not in ("cl2n", "l2n", "un"):
            raise ValueError(f"transform is {transform!r}, expected 'cl2n', 'l2n' or 'un'")
        dim = math.prod(output_shape(model, input_shape))
        super().__init__(model, nn.Linear(dim, training_classes))
        self.transform = transform
        self.training_mean = nn.Buffer(torch.zeros(dim))
        self.batches = nn.Buffer(torch.zeros(()))

    def embed(self, x: Tensor) -> Tensor:
        embedded = super().embed(x)
        if self.training:
            with torch.no_grad():
                self.batches.add_(1)
                weight = (1 / self.batches).clamp(min=self.MOMENTUM)  # at first a plain mean of what there was
                self.training_mean.lerp_(embedded.detach().mean(dim=0), weight.to(embedded.dtype))
        return embedded

    def classify(
        self,
        support: Tensor,
        support_y: Tensor,
        query: Tensor,
        ways: int,
        support_mask: Tensor | None = None,
    ) -> Tensor:
        return prototype_logits(self.transformed(support), support_y, self.transformed(query), ways, mask=support_mask)

    def transformed(self, embedded: Tensor) -> Tensor:
        """Embeddings [..., D] as their class means are taken and compared."""
        if self.transform == "un":
            return embedded
        return F.normalize(embedded - self.training_mean if self.transform == "cl2n" else embedded, dim=-1)
