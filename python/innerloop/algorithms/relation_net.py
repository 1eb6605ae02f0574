"""Relation networks."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from innerloop.contract import EmbeddingAlgorithm, Result, embed_tasks
from innerloop.models import Shape, output_shape
from innerloop.ops import prototypes
from innerloop.tasks import TaskBatch


class RelationNet(EmbeddingAlgorithm):
    """Relation networks: a learned comparison of feature maps (Sung et al. 2018).

    The feature maps of a query and of a class are concatenated in depth and a small convolutional network says how
    related they are, a score r in 0 … 1 (the paper's equation 1, its relation module as in figure 2). Trained by the
    mean squared error of the scores to 1 for the right class and 0 for the others (equation 2). The logits are those
    of the scores, log r − log(1 − r).

    Args:
        model: an embedding into feature maps, [N, ...] to [N, C, H, W] with H and W at least 4.
        input_shape: of one sample.
        hidden: width of the relation module's last hidden layer.
        pooling: of the feature maps of a class's samples: "mean", which is good for any number of shots; "sum" is the
            paper's, and differs where training and test have different shots.
    """

    training_defaults: ClassVar = {"steps": 1000, "meta_batch_size": 4, "ways": 5, "queries": 5, "clip": 0.0}
    model_defaults: ClassVar = {"conv4": {"halvings": 2}}

    def __init__(
        self, model: nn.Module, input_shape: Shape, hidden: int = 8, pooling: Literal["mean", "sum"] = "mean"
    ) -> None:
        super().__init__(model)
        if pooling not in ("mean", "sum"):
            raise ValueError(f"pooling is {pooling!r}, expected 'mean' or 'sum'")
        shape = output_shape(model, input_shape)
        if len(shape) != 3 or min(shape[1:]) < 4:
            raise ValueError(
                f"model gives embeddings of shape {list(shape)}, expected feature maps [C, H, W] of at least 4 × 4 for "
                "the relation module to convolve: conv4 with halvings=2 does, on 16 × 16 pixels or more"
            )
        self.pooling = pooling
        channels, height, width = shape
        self.compare = nn.Conv2d(2 * channels, channels, 3, padding=1)
        self.relation = nn.Sequential(
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(channels * (height // 4) * (width // 4), hidden),
            nn.ReLU(),
            nn.Linear(hidden, 1),
        )

    def embed(self, x: Tensor) -> Tensor:
        """Feature maps [N, C, H, W] of samples x [N, ...]."""
        return self.model(x)

    def forward(self, tasks: TaskBatch) -> Result:
        support, query = embed_tasks(self.embed, tasks)
        classes = self.class_maps(support, tasks.support_y, tasks.ways, tasks.support_mask)
        logits = self.relations(classes, query, tasks.query_mask)
        return Result.of(logits, tasks.query_y, tasks.query_mask, squared_error)

    def classify(
        self,
        support: Tensor,
        support_y: Tensor,
        query: Tensor,
        ways: int,
        support_mask: Tensor | None = None,
    ) -> Tensor:
        return self.relations(self.class_maps(support, support_y, ways, support_mask), query)

    def class_maps(self, support: Tensor, labels: Tensor, ways: int, mask: Tensor | None = None) -> Tensor:
        """The pooled feature maps of each class, [T, ways, C, H, W], of support maps [T, S, C, H, W]."""
        means = prototypes(support.flatten(2), labels, ways, mask=mask)
        if self.pooling == "sum":
            members = F.one_hot(labels if mask is None else torch.where(mask, labels, ways), ways + 1)[..., :ways]
            means = means * members.sum(dim=1)[..., None]
        return means.unflatten(2, support.shape[2:])

    def relations(self, classes: Tensor, query: Tensor, mask: Tensor | None = None) -> Tensor:
        """The logit of every relation score, [T, Q, ways]; 0 for padded queries, which enter no batch statistic.

        Args:
            classes: [T, ways, C, H, W]. query: [T, Q, C, H, W]. mask: [T, Q] bool.
        """
        # A convolution of two maps concatenated in depth is the sum of a convolution of each, and there are fewer maps
        # than pairs.
        of_class, of_query = self.compare.weight.split(query.shape[2], dim=1)
        from_query = F.conv2d(query.flatten(0, 1), of_query, self.compare.bias, padding=1)
        from_class = F.conv2d(classes.flatten(0, 1), of_class, padding=1)
        from_query, from_class = from_query.unflatten(0, query.shape[:2]), from_class.unflatten(0, classes.shape[:2])
        if not self.training:  # each pair is judged by itself: those of a task and a class at a time stay in the cache
            tasks = zip(from_query, from_class, strict=True)
            return torch.stack([torch.cat([self.relation(q + c) for c in task], dim=1) for q, task in tasks])
        pairs = from_query[:, :, None] + from_class[:, None]  # [T, Q, ways, C, H, W]
        if mask is None:
            return self.relation(pairs.flatten(0, 2)).reshape(pairs.shape[:3])
        logits = self.relation(pairs[mask].flatten(0, 1)).reshape(-1, classes.shape[1])
        return logits.new_zeros(pairs.shape[:3]).index_put((mask,), logits)


def squared_error(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean squared error of one task's relation scores, given as logits [Q, N], to the one-hot labels [Q]."""
    return F.mse_loss(logits.sigmoid(), F.one_hot(labels, logits.shape[1]).to(logits.dtype))
