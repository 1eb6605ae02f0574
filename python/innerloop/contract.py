"""What a plug-in implements: an algorithm, a data set, and the result they exchange.

An algorithm plug-in subclasses :class:`Algorithm` (or :class:`EmbeddingAlgorithm`), a data-set plug-in
:class:`Dataset` (or :class:`ClassDataset`), and names itself in the entry-point group ``innerloop.algorithms`` or
``innerloop.datasets``. Nothing else of the package needs to know it.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from innerloop.losses import Loss, accuracy_per_task, loss_per_task
from innerloop.tasks import TaskBatch

Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = ("train", "val", "test")


@dataclass(frozen=True)
class Result:
    """What an algorithm reports about a batch of T tasks.

    Attributes:
        loss: 0-d, the mean over tasks; differentiable with respect to the algorithm's parameters.
        task_losses: [T], detached; a task with a NaN shows it here and nowhere else.
        logits: [T, Q, *out], detached: the outputs for the query set after adaptation.
        task_accuracies: [T], the share of valid query samples classified rightly; None for regression.
    """

    loss: Tensor
    task_losses: Tensor
    logits: Tensor
    task_accuracies: Tensor | None = None

    @classmethod
    def of(cls, outputs: Tensor, targets: Tensor, mask: Tensor | None, loss: Loss = "cross_entropy") -> Result:
        """The result of outputs [T, Q, *out] for targets [T, Q] or [T, Q, *out], with mask [T, Q] or None."""
        losses = loss_per_task(outputs, targets, mask, loss)
        accuracies = None if targets.is_floating_point() else accuracy_per_task(outputs, targets, mask)
        return cls(losses.mean(), losses.detach(), outputs.detach(), accuracies)

    @property
    def accuracy(self) -> Tensor | None:
        """0-d mean of the task accuracies; None for regression."""
        return None if self.task_accuracies is None else self.task_accuracies.mean()


class Algorithm(nn.Module, ABC):
    """A meta-learning algorithm: a module whose parameters are what meta-training learns.

    The constructor takes the model first; its options are annotated keyword arguments with defaults, and that is all
    it takes for the command line to offer them. The first line of the class's docstring is its one-line description.
    A constructor that needs to know the training data asks for it by the name of an argument: ``input_shape`` is the
    shape of one sample, ``training_classes`` the number of classes to train on.

    A class attribute or instance attribute ``inner_steps`` (int), where an algorithm has one, is what evaluation
    changes for ``inner_steps=``; ``bn`` (str), where it has one, is recorded with every result. An algorithm that
    changes in the course of training has an instance attribute ``training_steps`` (int), which :func:`innerloop.fit`
    sets to the number of outer steps, and counts those done in a buffer, so that a resumed run goes on with them.
    """

    #: Whether the model keeps a classification head of its own (``ways`` outputs); embedding methods set False.
    needs_head: ClassVar[bool] = True

    training_steps: int  # declared alone: only algorithms that change in the course of training have it

    #: The settings with which this algorithm trains best where they are not TrainingSettings' own, by field name.
    training_defaults: ClassVar[Mapping[str, Any]] = {}

    #: The same for the options of a model, by the model's name.
    model_defaults: ClassVar[Mapping[str, Mapping[str, Any]]] = {}

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    @abstractmethod
    def forward(self, tasks: TaskBatch) -> Result:
        """Adapt to every task's support set and report on its query set."""

    @abstractmethod
    def adapt(self, support_x: Tensor, support_y: Tensor) -> nn.Module:
        """Adapt to one task, support_x [S, ...] and support_y [S]; the module returned maps query_x [Q, ...] to
        outputs [Q, *out] and is independent of this algorithm's parameters."""


class EmbeddingAlgorithm(Algorithm):
    """An algorithm that embeds every sample once and classifies embeddings by comparing them.

    A subclass writes :meth:`classify` alone. Training and evaluation share it, and evaluation embeds each image of a
    data set once, however many tasks it appears in. Below, D stands for the shape of one embedding, which is a number
    unless a subclass's :meth:`embed` makes it another.
    """

    needs_head = False

    @abstractmethod
    def classify(
        self,
        support: Tensor,
        support_y: Tensor,
        query: Tensor,
        ways: int,
        support_mask: Tensor | None = None,
    ) -> Tensor:
        """Log-probabilities up to a constant (logits) for every query sample.

        Args:
            support: [T, S, D] embeddings. support_y: [T, S] int64 labels in 0 … ways-1.
            query: [T, Q, D] embeddings.
            support_mask: [T, S] bool, False where a sample is padding; None: all are valid.

        Returns: [T, Q, ways].
        """

    def embed(self, x: Tensor) -> Tensor:
        """Embed samples x [N, ...] as [N, D]."""
        return self.model(x).flatten(1)

    def forward(self, tasks: TaskBatch) -> Result:
        support, query = embed_tasks(self.embed, tasks)
        logits = self.classify(support, tasks.support_y, query, tasks.ways, tasks.support_mask)
        return Result.of(logits, tasks.query_y, tasks.query_mask)

    def adapt(self, support_x: Tensor, support_y: Tensor) -> nn.Module:
        return _EmbeddingLearner(self, support_x, support_y)


def embed_tasks(embed: Callable[[Tensor], Tensor], tasks: TaskBatch) -> tuple[Tensor, Tensor]:
    """Embeddings of all samples of a batch of tasks by an embedding of samples [N, ...] as [N, D].

    One pass over support and query: what BatchNorm normalises with in train() is the whole episode, as in the papers'
    code. Padding is left out of it.

    Returns: support [T, S, D] and query [T, Q, D]; zeros where a sample is padding.
    """
    x = torch.cat((tasks.support_x.flatten(0, 1), tasks.query_x.flatten(0, 1)))
    valid = _valid(tasks)
    embedded = embed(x if valid is None else x[valid])
    if valid is not None:
        embedded = embedded.new_zeros(len(x), *embedded.shape[1:]).index_put((valid,), embedded)
    count, shots = tasks.support_x.shape[:2]
    support, query = embedded.tensor_split([count * shots])
    return support.unflatten(0, (count, -1)), query.unflatten(0, (count, -1))


def _valid(tasks: TaskBatch) -> Tensor | None:
    """Which of all support and then all query samples are no padding, [T·S + T·Q]; None: all."""
    if tasks.support_mask is None and tasks.query_mask is None:
        return None
    masks = (
        torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) if mask is None else mask
        for x, mask in ((tasks.support_x, tasks.support_mask), (tasks.query_x, tasks.query_mask))
    )
    return torch.cat([mask.flatten() for mask in masks])


class _EmbeddingLearner(nn.Module):
    """One task's embedded support set with a frozen copy of the algorithm that compares queries with it."""

    def __init__(self, algorithm: EmbeddingAlgorithm, support_x: Tensor, support_y: Tensor) -> None:
        super().__init__()
        self.algorithm = copy.deepcopy(algorithm).requires_grad_(False)
        self.ways = int(support_y.max()) + 1
        with torch.no_grad():
            self.support = nn.Buffer(self.algorithm.embed(support_x)[None])
        self.support_y = nn.Buffer(support_y[None])

    def forward(self, query_x: Tensor) -> Tensor:
        query = self.algorithm.embed(query_x)[None]
        return self.algorithm.classify(self.support, self.support_y, query, self.ways)[0]


class Dataset(ABC):
    """A source of tasks. Options are the constructor's annotated keyword arguments, as for an algorithm.

    Attributes:
        input_shape: shape of one sample x, for example (1, 28, 28).
        target_shape: None where targets are class labels; else the shape of one target, for example (1,).

    A data set that has its classes numbered says how many as ``num_classes``, and which of them a task's labels stand
    for as ``TaskBatch.classes``: algorithms that learn to tell all training classes apart need both.
    """

    input_shape: tuple[int, ...]
    target_shape: tuple[int, ...] | None = None

    @abstractmethod
    def split(self, name: Split) -> Dataset:
        """The part of the data for meta-training ("train"), validation ("val") or testing ("test")."""

    @abstractmethod
    def sample(self, tasks: int, ways: int, shots: int, queries: int, seed: int, first_task: int = 0) -> TaskBatch:
        """Tasks number first_task … first_task + tasks - 1 of the stream that seed names.

        Task i of a seed is the same task whatever the batch it is drawn in. shots and queries count samples per
        class; a regression data set ignores ways and takes them as samples per task.

        Raises:
            ValueError: fewer classes than ways, or a class with fewer than shots + queries samples.
        """
