"""Supervised pre-training: what a transfer method learns before it meets a task."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor, nn

from innerloop.contract import EmbeddingAlgorithm, Result, embed_tasks
from innerloop.tasks import TaskBatch

#: Training settings: tasks of one class, with a support and a query sample, are minibatches of 128 images.
MINIBATCHES = {"steps": 2000, "meta_batch_size": 64, "ways": 1, "queries": 1, "clip": 0.0}


class PretrainedEmbedding(EmbeddingAlgorithm):
    """An embedding method whose train() is supervised pre-training, and whose eval() classifies few-shot tasks.

    A batch of tasks is in train() but a minibatch of samples and their classes: the loss is that of
    :func:`pretraining_result`. A subclass writes :meth:`classify`.

    Args:
        model: an embedding, [N, ...] to [N, ...].
        classifier: maps embeddings [..., D] to a logit for each training class; learned, and not used afterwards.
    """

    training_defaults: ClassVar = MINIBATCHES

    def __init__(self, model: nn.Module, classifier: nn.Module) -> None:
        super().__init__(model)
        self.classifier = classifier

    def forward(self, tasks: TaskBatch) -> Result:
        if not self.training:
            return super().forward(tasks)
        support, query = embed_tasks(self.embed, tasks)
        return pretraining_result(self.classifier, support, query, tasks)


def pretraining_result(
    classifier: Callable[[Tensor], Tensor], support: Tensor, query: Tensor, tasks: TaskBatch
) -> Result:
    """The cross entropy of telling all training classes apart, over every sample of a batch of tasks.

    Which of its samples a task calls support and which query does not matter here: together they are a minibatch of
    samples and classes, and ``Result.logits`` are those of both, [T, S + Q, training_classes].

    Args:
        classifier: maps embeddings [..., D] to a logit for each training class.
        support: [T, S, D] embeddings of the support samples. query: [T, Q, D].
        tasks: which classes they are of.

    Raises:
        ValueError: the tasks do not say which classes of the data set they are made of, or name one that the
            classifier has no output for.
    """
    if tasks.classes is None:
        raise ValueError(
            "tasks.classes is None: pre-training needs to know which of all training classes a label stands for; a "
            "ClassDataset says so, and TaskBatch(..., classes=) does for tasks of your own"
        )
    logits = classifier(torch.cat((support, query), dim=1))
    if int(tasks.classes.max()) >= logits.shape[2]:
        raise ValueError(
            f"tasks.classes holds {int(tasks.classes.max())}, expected 0 … {logits.shape[2] - 1} (training_classes - 1)"
        )
    mask = None
    labels = torch.cat((tasks.support_y, tasks.query_y), dim=1)
    if tasks.support_mask is not None or tasks.query_mask is not None:
        both = ((tasks.support_mask, support), (tasks.query_mask, query))
        masks = [torch.ones_like(x[..., 0], dtype=torch.bool) if given is None else given for given, x in both]
        mask = torch.cat(masks, dim=1)
        labels = torch.where(mask, labels, 0)  # a padded sample's label may be anything
    return Result.of(logits, tasks.classes.gather(1, labels), mask)
