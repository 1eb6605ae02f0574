"""Matching networks."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from innerloop.contract import EmbeddingAlgorithm
from innerloop.models import Shape, output_shape
from innerloop.ops import attention_classify


class MatchingNet(EmbeddingAlgorithm):
    """Matching networks: attention over the support set by cosine similarity (Vinyals et al. 2016).

    The probability of a class is the attention that its support samples receive, equations 1 and 2 of the paper. The
    logits are log-probabilities. With full context embeddings (its section 2.1.2) the support set and each query are
    embedded anew in the context of the support set, by :class:`SupportContext` and :class:`QueryContext`. The first
    reads the support set in order: with full context embeddings another order gives other answers, without them it
    does not.

    Args:
        model: an embedding, [N, ...] to [N, ...].
        input_shape: of one sample; full context embeddings need it.
        full_context: embed support samples and queries in the context of the support set.
        reads: K, how often a query's LSTM reads the support set; only for full context embeddings.
        temperature: cosine similarities are divided by it before the softmax; the paper's is 1.
    """

    training_defaults: ClassVar = {"steps": 1000, "meta_batch_size": 1, "ways": 20, "queries": 5, "clip": 0.0}

    def __init__(
        self,
        model: nn.Module,
        input_shape: Shape | None = None,
        full_context: bool = False,
        reads: int = 5,
        temperature: float = 0.1,
    ) -> None:
        super().__init__(model)
        if not temperature > 0:
            raise ValueError(f"temperature is {temperature}, expected a positive number")
        if reads < 1:
            raise ValueError(f"reads is {reads}, expected at least 1")
        if full_context and input_shape is None:
            raise ValueError("input_shape is None, but full_context needs it: the LSTMs are as wide as an embedding")
        self.temperature = temperature
        self.g: SupportContext | None = None
        self.f: QueryContext | None = None
        if full_context and input_shape is not None:
            dim = math.prod(output_shape(model, input_shape))
            self.g, self.f = SupportContext(dim), QueryContext(dim, reads)

    def classify(
        self,
        support: Tensor,
        support_y: Tensor,
        query: Tensor,
        ways: int,
        support_mask: Tensor | None = None,
    ) -> Tensor:
        if self.g is not None and self.f is not None:
            support = self.g(support, support_mask)
            query = self.f(query, support, support_mask)
        return attention_classify(query, support, support_y, ways, temperature=self.temperature, mask=support_mask)


class SupportContext(nn.Module):
    """g(x, S): support samples in the context of the support set, by a bidirectional LSTM (the paper's appendix A.2).

    g(xᵢ, S) = h→ᵢ + h←ᵢ + g'(xᵢ), where h→ and h← are the outputs of an LSTM that reads g'(x₁) … g'(x_S) forwards and
    of one that reads them backwards. So the order of the support set is part of the input.

    Args:
        dim: D, of an embedding and of the LSTMs.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.lstm = nn.LSTM(dim, dim, batch_first=True, bidirectional=True)

    def forward(self, support: Tensor, mask: Tensor | None = None) -> Tensor:
        """[T, S, D] of embeddings g' [T, S, D]; mask [T, S] bool, False for padding, which is not read."""
        if mask is None:
            outputs, _ = self.lstm(support)
            return outputs.unflatten(2, (2, -1)).sum(dim=2) + support
        # Valid samples to the front, in their order, where packing has them; and back.
        order = mask.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[..., None]
        front = support.take_along_dim(order, dim=1)
        packed = pack_padded_sequence(front, mask.sum(dim=1).cpu(), batch_first=True, enforce_sorted=False)
        outputs, _ = pad_packed_sequence(self.lstm(packed)[0], batch_first=True, total_length=support.shape[1])
        both = outputs.unflatten(2, (2, -1)).sum(dim=2) + front
        return both.take_along_dim(order.argsort(dim=1), dim=1)


class QueryContext(nn.Module):
    """f(x̂, S): a query in the context of the support set, by an LSTM with attention (the paper's appendix A.1).

    For k = 1 … K, with h₀ = 0 and c₀ = 0, equations 3 to 6:
        r_{k−1} = Σᵢ a(h_{k−1}, g(xᵢ)) g(xᵢ), where a is the softmax over i of h_{k−1}ᵀ g(xᵢ)
        ĥ_k, c_k = LSTM(f'(x̂), [h_{k−1}, r_{k−1}], c_{k−1})
        h_k = ĥ_k + f'(x̂)
    and f(x̂, S) = h_K.

    Args:
        dim: D, of an embedding and of the LSTM. reads: K.
    """

    def __init__(self, dim: int, reads: int) -> None:
        super().__init__()
        # The gates are linear in input and state, so that r may come in with the input.
        self.lstm = nn.LSTMCell(2 * dim, dim)
        self.reads = reads

    def forward(self, query: Tensor, support: Tensor, mask: Tensor | None = None) -> Tensor:
        """[T, Q, D] of embeddings f' [T, Q, D]; support: g(x, S) [T, S, D]; mask [T, S] bool, False for padding."""
        flat = query.flatten(0, 1)  # [T·Q, D]: queries know nothing of each other
        h, c = torch.zeros_like(flat), torch.zeros_like(flat)
        for _ in range(self.reads):
            scores = h.unflatten(0, query.shape[:2]) @ support.mT  # [T, Q, S]
            if mask is not None:
                scores = scores.masked_fill(~mask[:, None], -torch.inf)
            read = (scores.softmax(dim=2) @ support).flatten(0, 1)
            out, c = self.lstm(torch.cat((flat, read), dim=1), (h, c))
            h = out + flat
        return h.unflatten(0, query.shape[:2])
