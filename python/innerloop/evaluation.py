"""Evaluation on a fixed list of tasks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from innerloop.contract import Algorithm, Dataset, EmbeddingAlgorithm
from innerloop.data.class_dataset import ClassDataset
from innerloop.distributed import add_up, rank, world_size
from innerloop.losses import accuracy_per_task, loss_per_task
from innerloop.tasks import TaskBatch

CHUNK = 20  # tasks drawn at a time; it changes memory, not results
QUERIES = 15  # query samples of a class in a validation or test task


@dataclass(frozen=True)
class Evaluation:
    """A result with everything that must be known to compare it.

    Attributes:
        metric: "accuracy", or "mse" for regression. mean: over episodes. ci95: half-width of the 95% confidence
            interval of the mean, 1.96 standard errors. episodes: number of tasks.
        ways: classes of a task; None in regression.
        shots: support samples of a class, or in regression of a task. queries: query samples, likewise.
        seed: of the task list.
        inner_steps: gradient steps of the adaptation; None for methods without. bn: what BatchNorm normalised with.
    """

    metric: Literal["accuracy", "mse"]
    mean: float
    ci95: float
    episodes: int
    ways: int | None
    shots: int | None
    queries: int | None
    seed: int | None
    inner_steps: int | None
    bn: str

    @property
    def higher_is_better(self) -> bool:
        return self.metric == "accuracy"

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        tasks = f"{self.ways}-way {self.shots}-shot, " if self.metric == "accuracy" and self.ways else ""
        steps = "" if self.inner_steps is None else f", inner steps {self.inner_steps}"
        if self.metric == "accuracy":
            value = f"accuracy {100 * self.mean:.2f} ± {100 * self.ci95:.2f} %"
        else:
            value = f"mean squared error {self.mean:.4f} ± {self.ci95:.4f}"
        return f"{value} ({tasks}{self.episodes} episodes{steps}, BatchNorm {self.bn})"


def evaluate(
    algorithm: Algorithm,
    tasks: Dataset | Iterable[TaskBatch],
    ways: int = 5,
    shots: int = 1,
    episodes: int = 600,
    inner_steps: int | None = None,
    seed: int = 0,
    queries: int = QUERIES,
    distributed: bool = False,
) -> Evaluation:
    """Mean accuracy (or mean squared error) over episodes with its 95% confidence interval.

    The algorithm is in eval mode and no gradient is kept for the outer loop. An embedding method on a ClassDataset
    embeds each sample once, then draws its episodes from the embeddings.

    Args:
        tasks: a Dataset, from which the same tasks are drawn for the same seed; or task batches, all of which count.
        ways: classes of a task. shots, queries: support and query samples of a class.
        episodes: number of tasks, at least 2.
        inner_steps: gradient steps in place of the algorithm's own.
        distributed: share the tasks between the processes of torch.distributed, each of which must call this; every
            one returns what a single process would.

    Returns: mean and interval, with what must be known to compare them.

    Raises:
        ValueError: inner_steps for an algorithm without an inner loop, or too few episodes.

    Examples:
        >>> model = innerloop.models.build("conv4")((1, 28, 28), outputs=5, filters=8)
        >>> algorithm = innerloop.get("maml")(model)
        >>> print(innerloop.evaluate(algorithm, innerloop.data.get("glyphs").split("test"), episodes=20))
        accuracy ... ± ... % (5-way 1-shot, 20 episodes, inner steps 1, BatchNorm transductive)
    """
    if episodes < 2:
        raise ValueError(f"episodes is {episodes}, expected at least 2: an interval needs a spread")
    score: Callable[[Any, TaskBatch], tuple[bool, Tensor]] = _score
    with _evaluating(algorithm, inner_steps):
        if isinstance(tasks, Dataset):
            source: Dataset = tasks
            if isinstance(algorithm, EmbeddingAlgorithm) and isinstance(tasks, ClassDataset):
                score, source = _score_embedded, embed(algorithm, tasks)
            chunks = _episodes(source, ways, shots, queries, seed, episodes)
        else:
            chunks = _batches(tasks)
        values, is_classification = _scores(chunks, partial(score, algorithm), distributed)
        steps = getattr(algorithm, "inner_steps", None)
    drawn = isinstance(tasks, Dataset)  # only then are these numbers known
    if len(values) < 2:
        raise ValueError(f"tasks holds {len(values)} episodes, expected at least 2")
    return Evaluation(
        metric="accuracy" if is_classification else "mse",
        mean=float(values.mean()),
        ci95=1.96 * float(values.std()) / math.sqrt(len(values)),
        episodes=len(values),
        ways=ways if drawn and is_classification else None,
        shots=shots if drawn else None,
        queries=queries if drawn else None,
        seed=seed if drawn else None,
        inner_steps=steps,
        bn=batch_norm_mode(algorithm),
    )


def batch_norm_mode(algorithm: Algorithm) -> str:
    """What BatchNorm normalises with in evaluation: the algorithm's ``bn``, else eval mode's running statistics."""
    if not any(isinstance(module, _BatchNorm) for module in algorithm.modules()):
        return "none"
    return str(getattr(algorithm, "bn", "running"))


def embed(algorithm: EmbeddingAlgorithm, dataset: ClassDataset, batch: int = 500) -> ClassDataset:
    """The data set's classes with each example's embedding in place of the example."""
    part = dataset.compact()
    device = next((parameter.device for parameter in algorithm.parameters()), torch.device("cpu"))
    with torch.no_grad():
        embedded = [
            algorithm.embed(part.to_input(part.examples[start : start + batch]).to(device)).cpu()
            for start in range(0, len(part.examples), batch)
        ]
    return part.with_examples(torch.cat(embedded).numpy())


@contextmanager
def _evaluating(algorithm: Algorithm, inner_steps: int | None) -> Iterator[None]:
    if inner_steps is not None and not hasattr(algorithm, "inner_steps"):
        raise ValueError(f"inner_steps is {inner_steps}, but {type(algorithm).__name__} has no inner loop")
    was_training, own_steps = algorithm.training, getattr(algorithm, "inner_steps", None)
    algorithm.eval()
    try:
        if inner_steps is not None:
            algorithm.inner_steps = inner_steps  # type: ignore[assignment]
        with torch.no_grad():
            yield
    finally:
        algorithm.train(was_training)
        if inner_steps is not None:
            algorithm.inner_steps = own_steps  # type: ignore[assignment]


#: A number of tasks, and what draws them.
_Chunk = tuple[int, Callable[[], TaskBatch]]


def _episodes(dataset: Dataset, ways: int, shots: int, queries: int, seed: int, episodes: int) -> Iterator[_Chunk]:
    for first in range(0, episodes, CHUNK):
        count = min(CHUNK, episodes - first)
        yield count, partial(dataset.sample, count, ways, shots, queries, seed, first_task=first)


def _batches(batches: Iterable[TaskBatch]) -> Iterator[_Chunk]:
    for batch in batches:
        yield len(batch), partial(_as_it_is, batch)


def _as_it_is(batch: TaskBatch) -> TaskBatch:
    return batch


def _scores(
    chunks: Iterable[_Chunk], score: Callable[[TaskBatch], tuple[bool, Tensor]], distributed: bool
) -> tuple[Tensor, bool]:
    """A value for each task, float64, and whether all are accuracies.

    distributed: each process scores every so many-th chunk and leaves 0 for the others, whose sum is exact.
    """
    own, size = (rank(), world_size()) if distributed else (0, 1)
    values, all_accuracies = [], True
    for number, (count, draw) in enumerate(chunks):
        if number % size == own:
            accurate, scores = score(draw())
            all_accuracies = all_accuracies and accurate
            values.append(scores.double())
        else:
            values.append(torch.zeros(count, dtype=torch.float64))
    table = torch.cat([torch.tensor([float(not all_accuracies)], dtype=torch.float64), *values])
    if distributed:
        add_up(table)
    return table[1:], not table[0]


def _score(algorithm: Algorithm, batch: TaskBatch) -> tuple[bool, Tensor]:
    """(whether these are accuracies, a value for each task)."""
    result = algorithm(batch)
    if result.task_accuracies is not None:
        return True, result.task_accuracies.cpu()
    return False, loss_per_task(result.logits, batch.query_y, batch.query_mask, "mse").cpu()


def _score_embedded(algorithm: EmbeddingAlgorithm, batch: TaskBatch) -> tuple[bool, Tensor]:
    """The same for a batch of embeddings."""
    logits = algorithm.classify(batch.support_x, batch.support_y, batch.query_x, batch.ways)
    return True, accuracy_per_task(logits, batch.query_y, None)
