"""What heads.py measures: losses of few-shot heads on given embeddings, and the gradient for them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

Arrays = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


@dataclass(frozen=True)
class HeadWorkload:
    """One row of the table.

    Attributes:
        name: on the command line.
        kind: the head; its rivals are those of rivals.HEADS whose names begin with it.
        tasks, ways, shots, queries: T tasks of N classes with K support and so many query samples each.
        dim: of the embeddings.
    """

    name: str
    kind: Literal["prototypes", "ridge", "svm"]
    tasks: int
    ways: int
    shots: int
    queries: int
    dim: int

    @property
    def title(self) -> str:
        return (
            f"{self.tasks} task{'s' if self.tasks > 1 else ''}, {self.ways}-way {self.shots}-shot, "
            f"{self.queries} queries a class, dim {self.dim}"
        )

    @property
    def flops(self) -> int:
        """Of the three products of queries and prototypes (weights of the other heads): the scores, and a gradient for
        each. Of these heads also the Gram matrix, and five products of support set and classes."""
        products = 3 * self.ways * self.queries * self.ways
        if self.kind != "prototypes":
            support = self.ways * self.shots
            products += support * (support + 1) // 2 + 5 * support * self.ways
        return 2 * self.tasks * products * self.dim


HEAD_WORKLOADS = {
    workload.name: workload
    for workload in [
        HeadWorkload("prototypes-20way", "prototypes", 64, 20, 5, 15, 64),
        HeadWorkload("prototypes-60way", "prototypes", 1, 60, 5, 15, 1600),
        HeadWorkload("prototypes-5way", "prototypes", 64, 5, 5, 15, 1600),
        HeadWorkload("ridge-5way", "ridge", 8, 5, 5, 15, 16000),
        HeadWorkload("svm-5way", "svm", 8, 5, 5, 15, 16000),
    ]
}


def make_embeddings(workload: HeadWorkload, dtype: str) -> Arrays:
    """support [T, shots · ways, D], labels 0, 1, …, ways-1, 0, 1, …, queries [T, queries · ways, D], their labels.

    Normal, of a size that leaves every class a probability.
    """
    random = np.random.default_rng(1)

    def draw(count: int) -> tuple[np.ndarray, np.ndarray]:
        x = 2 / workload.dim**0.5 * random.standard_normal((workload.tasks, count * workload.ways, workload.dim))
        labels = np.broadcast_to(np.arange(count * workload.ways) % workload.ways, x.shape[:2])
        return np.ascontiguousarray(x, dtype), np.ascontiguousarray(labels, np.int64)

    return *draw(workload.shots), *draw(workload.queries)
