"""Prototypical networks."""

from __future__ import annotations

from typing import ClassVar, get_args

from torch import Tensor, nn

from innerloop.contract import EmbeddingAlgorithm
from innerloop.ops import prototype_logits
from innerloop.ops.pairwise_distance import Metric
from innerloop.registry import check_choice


class ProtoNet(EmbeddingAlgorithm):
    """Prototypical networks: classify by the distance to the class means (Snell et al. 2017).

    The logits are the negative squared Euclidean distances of the paper's equation 2, or those of another metric. Tasks
    of training and of testing may have different ways and shots; more ways in training are the paper's advice (its
    section 2.6).

    Args:
        model: an embedding, [N, ...] to [N, ...].
        metric: "sqeuclidean", the paper's; "euclidean", "cosine", or "dot".
        temperature: logits are divided by it; a cosine needs one well below 1.
    """

    training_defaults: ClassVar = {"steps": 600, "meta_batch_size": 1, "ways": 20, "queries": 5, "clip": 0.0}

    def __init__(self, model: nn.Module, metric: Metric = "sqeuclidean", temperature: float = 1.0) -> None:
        super().__init__(model)
        check_choice(metric, "metric", get_args(Metric))
        if not temperature > 0:
            raise ValueError(f"temperature is {temperature}, expected a positive number")
        self.metric = metric
        self.temperature = temperature

    def classify(
        self,
        support: Tensor,
        support_y: Tensor,
        query: Tensor,
        ways: int,
        support_mask: Tensor | None = None,
    ) -> Tensor:
        return prototype_logits(
            support, support_y, query, ways, metric=self.metric, temperature=self.temperature, mask=support_mask
        )
