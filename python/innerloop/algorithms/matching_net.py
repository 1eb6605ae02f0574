"""Matching networks."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from innerloop.contract import EmbeddingAlgorithm
from innerloop.ops import attention_classify


class MatchingNet(EmbeddingAlgorithm):
    """Matching networks: attention over the support set by cosine similarity (Vinyals et al. 2016).

    The probability of a class is the attention that its support samples receive, equation 1 and 2 of the paper,
    without its full context embeddings. The logits are log-probabilities.

    Args:
        model: an embedding, [N, ...] to [N, ...].
        temperature: cosine similarities are divided by it before the softmax; the paper's is 1.
    """

    training_defaults: ClassVar = {"steps": 1000, "meta_batch_size": 1, "ways": 20, "queries": 5, "clip": 0.0}

    def __init__(self, model: nn.Module, temperature: float = 0.1) -> None:
        super().__init__(model)
        if not temperature > 0:
            raise ValueError(f"temperature is {temperature}, expected a positive number")
        self.temperature = temperature

    def classify(
        self,
        support: Tensor,
        support_y: Tensor,
        query: Tensor,
        ways: int,
        support_mask: Tensor | None = None,
    ) -> Tensor:
        return attention_classify(query, support, support_y, ways, temperature=self.temperature, mask=support_mask)
