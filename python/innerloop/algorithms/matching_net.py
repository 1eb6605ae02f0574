"""Matching networks."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from innerloop.contract import EmbeddingAlgorithm
from innerloop.ops import pairwise_distance


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
        similarity = (1 - pairwise_distance(query, support, metric="cosine")) / self.temperature  # [T, Q, S]
        if support_mask is not None:
            similarity = similarity.masked_fill(~support_mask[:, None], -torch.inf)
        attention = similarity.log_softmax(dim=2)
        # log of the sum over a class's samples, by logsumexp: no probability is rounded to zero first
        members = F.one_hot(torch.where(support_mask, support_y, 0) if support_mask is not None else support_y, ways)
        members = members.bool().transpose(1, 2)[:, None]  # [T, 1, N, S]
        return attention[:, :, None].masked_fill(~members, -torch.inf).logsumexp(dim=3)
