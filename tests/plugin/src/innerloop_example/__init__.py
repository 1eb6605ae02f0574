"""An innerloop plug-in: a one-nearest-neighbour few-shot learner, and Gaussian blobs to try it on."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from innerloop import Dataset, EmbeddingAlgorithm, TaskBatch


class NearestSample(EmbeddingAlgorithm):
    """Each query takes the class of the nearest support embedding.

    Args:
        model: maps samples [N, ...] to embeddings.
        temperature: distances are divided by this before the softmax of the loss.
    """

    def __init__(self, model: nn.Module, temperature: float = 1.0) -> None:
        super().__init__(model)
        self.temperature = temperature

    def classify(
        self,
        support: Tensor,
        support_y: Tensor,
        query: Tensor,
        ways: int,
        support_mask: Tensor | None = None,
    ) -> Tensor:
        similarity = -torch.cdist(query, support) / self.temperature  # [T, Q, S]
        if support_mask is not None:
            similarity = similarity.masked_fill(~support_mask[:, None], -torch.inf)
        logits = similarity.new_full((*query.shape[:2], ways), -torch.inf)
        classes = support_y[:, None].expand_as(similarity)
        return logits.scatter_reduce(2, classes, similarity, "amax")


class Blobs(Dataset):
    """Points around random class centres.

    Args:
        dimension: of a point.
        spread: standard deviation of a class around its centre; the centres' is 1.
    """

    def __init__(self, dimension: int = 8, spread: float = 0.3) -> None:
        self.input_shape = (dimension,)
        self.spread = spread
        self.part = 0

    def split(self, name: str) -> Blobs:
        chosen = copy.copy(self)
        chosen.part = ("train", "val", "test").index(name)  # other random numbers, hence other classes
        return chosen

    def sample(self, tasks: int, ways: int, shots: int, queries: int, seed: int, first_task: int = 0) -> TaskBatch:
        drawn = [self._task(ways, shots, queries, seed, first_task + index) for index in range(tasks)]
        return TaskBatch.from_tasks(drawn)

    def _task(
        self, ways: int, shots: int, queries: int, seed: int, index: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        random = torch.Generator().manual_seed(hash((seed, self.part, index)) % 2**63)
        centres = torch.randn(ways, 1, *self.input_shape, generator=random)
        noise = torch.randn(ways, shots + queries, *self.input_shape, generator=random)
        points = centres + self.spread * noise
        labels = torch.arange(ways)[:, None]
        support, query = points.split((shots, queries), dim=1)
        return (
            support.flatten(0, 1),
            labels.expand(ways, shots).flatten(),
            query.flatten(0, 1),
            labels.expand(ways, queries).flatten(),
        )
