"""MetaOptNet."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from innerloop.contract import EmbeddingAlgorithm
from innerloop.ops import ridge_head, svm_head


class MetaOptNet(EmbeddingAlgorithm):
    """MetaOptNet: a convex classifier solved on each support set, differentiated through (Lee et al. 2019).

    The support set's embeddings are separated by a multi-class linear SVM, or fitted by ridge regression to the one-hot
    labels (the paper's section 3), and the logits are its scores of the queries times a learned scale. The authors
    train with more shots than they test with.

    Args:
        model: an embedding, [N, ...] to [N, ...].
        head: "svm", or "ridge".
        C: of the SVM, what a violated margin costs; the paper's is 0.1.
        regularization: λ of ridge regression; the authors' is 50.
    """

    training_defaults: ClassVar = {"steps": 1000, "meta_batch_size": 1, "ways": 20, "queries": 5, "clip": 0.0}

    def __init__(
        self, model: nn.Module, head: Literal["svm", "ridge"] = "svm", C: float = 0.1, regularization: float = 50.0
    ) -> None:
        super().__init__(model)
        if head not in ("svm", "ridge"):
            raise ValueError(f"head is {head!r}, expected 'svm' or 'ridge'")
        if not C > 0:
            raise ValueError(f"C is {C}, expected a positive number")
        if not regularization > 0:
            raise ValueError(f"regularization is {regularization}, expected a positive number")
        self.head = head
        self.C = C
        self.regularization = regularization
        self.scale = nn.Parameter(torch.ones(()))

    def classify(
        self,
        support: Tensor,
        support_y: Tensor,
        query: Tensor,
        ways: int,
        support_mask: Tensor | None = None,
    ) -> Tensor:
        if self.head == "svm":
            scores = svm_head(support, support_y, query, ways, C=self.C, mask=support_mask)
        else:
            scores = ridge_head(support, support_y, query, ways, regularization=self.regularization, mask=support_mask)
        return self.scale * scores
