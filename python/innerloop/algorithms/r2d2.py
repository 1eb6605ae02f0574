"""R2-D2: ridge regression differentiable discriminator."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor, nn

from innerloop.contract import EmbeddingAlgorithm
from innerloop.ops import ridge_head


class R2D2(EmbeddingAlgorithm):
    """R2-D2: ridge regression on each support set, in closed form, with a learned λ (Bertinetto et al. 2019).

    W = (XᵀX/S + λI)⁻¹ XᵀY/S for the S support embeddings X, to each of which a 1 is appended for the bias, and their
    one-hot labels Y (the paper's section 3; the 1 and the means over samples as in the authors' code). The logits are
    α·XW + β. λ, α and β are learned; β, one number for all classes, is the paper's and changes no softmax.

    Args:
        model: an embedding, [N, ...] to [N, ...].
        regularization: λ to begin with.
        scale: α to begin with.
    """

    training_defaults: ClassVar = {"steps": 1000, "meta_batch_size": 1, "ways": 20, "queries": 5, "clip": 0.0}

    def __init__(self, model: nn.Module, regularization: float = 1.0, scale: float = 10.0) -> None:
        super().__init__(model)
        if not regularization > 0:
            raise ValueError(f"regularization is {regularization}, expected a positive number")
        self.log_regularization = nn.Parameter(torch.tensor(math.log(regularization)))  # a λ that stays positive
        self.scale = nn.Parameter(torch.tensor(float(scale)))
        self.bias = nn.Parameter(torch.zeros(()))

    def classify(
        self,
        support: Tensor,
        support_y: Tensor,
        query: Tensor,
        ways: int,
        support_mask: Tensor | None = None,
    ) -> Tensor:
        count: Tensor | int = support.shape[1]
        if support_mask is not None:
            count = support_mask.sum(dim=1)[:, None, None]
        # With X and the queries over √S, the scores of XᵀX + λI and XᵀY are those of their means.
        root = torch.as_tensor(count, dtype=support.dtype, device=support.device).sqrt()
        scores = ridge_head(
            _with_one(support) / root,
            support_y,
            _with_one(query) / root,
            ways,
            regularization=self.log_regularization.exp(),
            mask=support_mask,
        )
        return self.scale * scores + self.bias


def _with_one(x: Tensor) -> Tensor:
    """Embeddings [T, N, D] with a 1 appended: [T, N, D + 1]."""
    return torch.cat((x, torch.ones_like(x[..., :1])), dim=2)
