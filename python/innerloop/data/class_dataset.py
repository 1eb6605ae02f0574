"""Samples grouped by class, and the tasks drawn from them."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from innerloop import _native
from innerloop.contract import SPLITS, Dataset, Split
from innerloop.registry import nearest
from innerloop.tasks import TaskBatch

Array = npt.NDArray[np.generic]


class ClassDataset(Dataset):
    """A data set of classes with many samples each.

    Args:
        examples: [N, ...] grouped by class: uint8 images [N, H, W] or [N, H, W, C] that :meth:`to_input` scales to
            0 … 1, or floating-point samples that it takes as they are. May be a memory map.
        class_sizes: how many of the examples each class has, in their order.
        class_names: one for each class.
        splits: class indices of "train", "val" and "test"; None where there is but one part.
    """

    def __init__(
        self,
        examples: Array,
        class_sizes: Sequence[int] | npt.NDArray[np.int64],
        class_names: Sequence[str],
        splits: Mapping[Split, npt.NDArray[np.int64]] | None = None,
    ) -> None:
        starts = np.concatenate(([0], np.cumsum(class_sizes, dtype=np.int64)))
        if starts[-1] != len(examples):
            raise ValueError(f"class_sizes sums to {starts[-1]}, expected the number of examples, {len(examples)}")
        if len(class_names) != len(class_sizes):
            raise ValueError(f"class_names has {len(class_names)} entries, expected {len(class_sizes)}")
        self.examples = examples
        self.class_names = list(class_names)
        self._starts = starts
        self._splits = dict(splits or {})
        self._draw_from(np.arange(len(class_names), dtype=np.int64))
        self.input_shape = self._input_shape()

    def _draw_from(self, classes: npt.NDArray[np.int64]) -> None:
        sizes = self._starts[classes + 1] - self._starts[classes]
        self._classes = classes
        # Of every example's class, its place among those that tasks are drawn from.
        self._places = np.full(len(self.class_names), -1, dtype=np.int64)
        self._places[classes] = np.arange(len(classes))
        # Found once, not for every task. Where there is no class, the sampler says so.
        self._smallest = int(classes[sizes.argmin()]) if len(classes) else None

    def _input_shape(self) -> tuple[int, ...]:
        shape = self.examples.shape[1:]
        if self.examples.dtype != np.uint8:
            return tuple(shape)
        return (1, *shape) if len(shape) == 2 else (shape[2], shape[0], shape[1])

    @property
    def num_classes(self) -> int:
        """Number of classes that tasks are drawn from."""
        return len(self._classes)

    @property
    def classes(self) -> npt.NDArray[np.int64]:
        """The classes that tasks are drawn from, as indices into class_names."""
        return self._classes

    def class_examples(self, index: int) -> Array:
        """The examples of one class."""
        return self.examples[self._starts[index] : self._starts[index + 1]]

    def split(self, name: Split) -> ClassDataset:
        if name not in self._splits:
            there = [part for part in SPLITS if part in self._splits]
            raise ValueError(f"split is {name!r}.{nearest(str(name), list(map(str, there)))}")
        return self.with_classes(self._splits[name])

    def with_classes(self, classes: npt.NDArray[np.int64] | Sequence[int]) -> ClassDataset:
        """The same examples, tasks drawn from these classes alone (indices into class_names)."""
        chosen = np.asarray(classes, dtype=np.int64)
        if chosen.ndim != 1 or len(np.unique(chosen)) != len(chosen):
            raise ValueError(f"classes is {classes}, expected a list of different indices")
        if len(chosen) and not 0 <= chosen.min() <= chosen.max() < len(self.class_names):
            raise ValueError(f"classes is {classes}, expected indices in 0 … {len(self.class_names) - 1}")
        part = copy.copy(self)
        part._draw_from(chosen)
        part._splits = {}
        return part

    def with_examples(self, examples: Array) -> ClassDataset:
        """The same classes over other examples, one for each of these: their embeddings, say."""
        if len(examples) != len(self.examples):
            raise ValueError(f"examples has {len(examples)} entries, expected {len(self.examples)}")
        twin = copy.copy(self)
        twin.examples = examples
        twin.input_shape = twin._input_shape()
        return twin

    def compact(self) -> ClassDataset:
        """The same classes without the examples of the others."""
        parts = [self.class_examples(int(index)) for index in self._classes]
        sizes = [len(part) for part in parts]
        return ClassDataset(np.concatenate(parts), sizes, [self.class_names[index] for index in self._classes])

    def sample_indices(
        self, tasks: int, ways: int, shots: int, queries: int, seed: int, first_task: int = 0
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Indices into examples: support [T, ways * shots], query [T, ways * queries], class by class.

        The label of position p is p // shots (p // queries). Arguments and errors as :meth:`Dataset.sample`.
        """
        if seed < 0 or first_task < 0:
            raise ValueError(f"seed is {seed} and first_task {first_task}, expected at least 0")
        smallest = self._smallest
        if smallest is not None and (size := self._starts[smallest + 1] - self._starts[smallest]) < shots + queries:
            raise ValueError(
                f"class {self.class_names[smallest]!r}, the smallest, has {size} samples, "
                f"but shots + queries is {shots + queries}"
            )
        return _native.sample_tasks(
            self._starts, self._classes, ways, shots, queries, seed=seed, first_task=first_task, tasks=tasks
        )

    def sample(self, tasks: int, ways: int, shots: int, queries: int, seed: int, first_task: int = 0) -> TaskBatch:
        if min(tasks, shots, queries) < 1:
            raise ValueError(f"tasks, shots and queries are {tasks}, {shots}, {queries}, expected at least 1")
        support, query = self.sample_indices(tasks, ways, shots, queries, seed, first_task)
        labels = torch.arange(ways)
        drawn = np.searchsorted(self._starts, support[:, ::shots], side="right") - 1
        return TaskBatch(
            self.to_input(self.examples[support.ravel()]).unflatten(0, support.shape),
            labels.repeat_interleave(shots).expand(tasks, -1).contiguous(),
            self.to_input(self.examples[query.ravel()]).unflatten(0, query.shape),
            labels.repeat_interleave(queries).expand(tasks, -1).contiguous(),
            classes=torch.from_numpy(self._places[drawn]),
        )

    def to_input(self, examples: Array) -> Tensor:
        """Examples [N, ...] as a model's input [N, *input_shape], float32 (float64 examples stay float64)."""
        tensor = torch.from_numpy(np.require(examples, requirements=["C", "W"]))  # a memory map is copied
        if tensor.dtype != torch.uint8:
            return tensor
        tensor = tensor[:, None] if tensor.dim() == 3 else tensor.permute(0, 3, 1, 2)
        return tensor.to(torch.float32).div_(255)


def add_quarter_turns(
    images: npt.NDArray[np.uint8],
    class_sizes: npt.NDArray[np.int64],
    class_names: Sequence[str],
    classes: npt.NDArray[np.int64],
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64], list[str], npt.NDArray[np.int64]]:
    """Square images [N, H, H] with those of some classes turned by 90, 180 and 270 degrees as classes of their own.

    Returns: images, class_sizes and class_names with the new classes behind the old, and the new classes' indices.
    """
    upright = images[np.repeat(np.isin(np.arange(len(class_sizes)), classes), class_sizes)]
    chosen = np.sort(classes)
    turns = (1, 2, 3)
    names = [f"{class_names[index]} turned {90 * quarter}°" for quarter in turns for index in chosen]
    return (
        np.concatenate([images, *(np.rot90(upright, quarter, axes=(1, 2)) for quarter in turns)]),
        np.concatenate([class_sizes, *[class_sizes[chosen]] * len(turns)]),
        [*class_names, *names],
        np.arange(len(class_names), len(class_names) + len(names)),
    )
