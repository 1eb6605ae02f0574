"""A batch of few-shot tasks."""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, SupportsIndex

import torch
from torch import Tensor

_TENSORS = ("support_x", "support_y", "query_x", "query_y")
_OPTIONAL_TENSORS = ("support_mask", "query_mask", "classes")

Task = tuple[Tensor, Tensor, Tensor, Tensor]  # support_x, support_y, query_x, query_y without the leading T


@dataclass(frozen=True, eq=False)
class TaskBatch:
    """T tasks, each a support set of S samples to adapt on and a query set of Q samples to be judged on.

    Args:
        support_x: [T, S, ...] floating point. query_x: [T, Q, ...], the same dtype and sample shape.
        support_y: [T, S] int64 class labels from 0, or floating-point targets [T, S, *out] of exactly the shape of the
            model's outputs. query_y: [T, Q] or [T, Q, *out], the same kind.
        support_mask: [T, S] bool, False where a sample is padding. None: all samples are valid. query_mask: [T, Q].
            A masked sample enters no loss, no mean and no batch statistic; its label is not read.
        classes: [T, N] int64, the class of the data set, 0 … its num_classes - 1, that each task's labels 0 … N-1 stand
            for: what a classifier of all training classes learns from. None: not known.

    Raises:
        TypeError: a dtype is not one of those above.
        ValueError: shapes or devices do not fit together, a label or class is negative, or a task has no valid sample.

    Examples:
        >>> labels = torch.arange(5).expand(4, 5)  # 5 classes with one sample each, in each of 4 tasks
        >>> tasks = innerloop.TaskBatch(torch.rand(4, 5, 1, 28, 28), labels, torch.rand(4, 5, 1, 28, 28), labels)
        >>> len(tasks), tasks.ways, tasks[1:3].num_tasks
        (4, 5, 2)
    """

    support_x: Tensor
    support_y: Tensor
    query_x: Tensor
    query_y: Tensor
    support_mask: Tensor | None = None
    query_mask: Tensor | None = None
    classes: Tensor | None = None

    #: Number of classes, one more than the largest valid label of either set; None for regression.
    _ways: int | None = field(init=False, default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name, tensor in self._tensors():
            if not isinstance(tensor, Tensor):
                raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
        devices = {name: tensor.device for name, tensor in self._tensors()}
        odd = [name for name, device in devices.items() if device != self.support_x.device]
        if odd:
            raise ValueError(f"{odd[0]} is on {devices[odd[0]]}, expected support_x's device {self.support_x.device}")
        _check_inputs(self.support_x, self.query_x)
        for side in ("support", "query"):
            x, y, mask = (getattr(self, f"{side}_{part}") for part in ("x", "y", "mask"))
            _check_targets(side, x, y)
            if mask is not None:
                _check_mask(side, x, mask)
        if self.support_y.is_floating_point() != self.query_y.is_floating_point():
            raise TypeError(
                f"query_y has dtype {self.query_y.dtype} but support_y {self.support_y.dtype}: "
                "both must be class labels (int64), or both targets (floating point)"
            )
        if self.support_y.shape[2:] != self.query_y.shape[2:]:
            raise ValueError(
                f"query_y has target shape {tuple(self.query_y.shape[2:])}, "
                f"expected support_y's {tuple(self.support_y.shape[2:])}"
            )
        if self.is_classification:
            largest = max(_largest_label(side, *self._labels(side)) for side in ("support", "query"))
            object.__setattr__(self, "_ways", largest + 1)
        if self.classes is not None:
            _check_classes(self.classes, self.num_tasks, self._ways)

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        for name in _TENSORS:
            yield name, getattr(self, name)
        for name in _OPTIONAL_TENSORS:
            if getattr(self, name) is not None:
                yield name, getattr(self, name)

    def _labels(self, side: str) -> tuple[Tensor, Tensor | None]:
        return getattr(self, f"{side}_y"), getattr(self, f"{side}_mask")

    @property
    def num_tasks(self) -> int:
        """T."""
        return self.support_x.shape[0]

    @property
    def is_classification(self) -> bool:
        """Whether the targets are class labels."""
        return not self.support_y.is_floating_point()

    @property
    def ways(self) -> int:
        """The number of classes, one more than the largest valid label.

        Raises:
            ValueError: the targets are not class labels.
        """
        if self._ways is None:
            raise ValueError("ways is defined for class labels only; support_y holds floating-point targets")
        return self._ways

    @property
    def device(self) -> torch.device:
        return self.support_x.device

    def __len__(self) -> int:
        return self.num_tasks

    def __getitem__(self, index: SupportsIndex | slice | Sequence[int] | Tensor) -> TaskBatch:
        """The chosen tasks as a TaskBatch; a number keeps the leading dimension, of size 1."""
        chosen: Any = index
        if isinstance(index, SupportsIndex) and not (isinstance(index, Tensor) and index.dim() > 0):
            number = operator.index(index)
            if not -self.num_tasks <= number < self.num_tasks:
                raise IndexError(f"task {number} of a batch of {self.num_tasks}")
            chosen = slice(number, number + 1 or None)
        return TaskBatch(**{name: tensor[chosen] for name, tensor in self._tensors()})

    def __iter__(self) -> Iterator[TaskBatch]:
        """The tasks one by one, each a TaskBatch with num_tasks 1."""
        return (self[index] for index in range(self.num_tasks))

    def to(self, *args: Any, **kwargs: Any) -> TaskBatch:
        """Every tensor moved as by Tensor.to; a floating-point dtype converts inputs and targets, never labels."""
        device, dtype, non_blocking, _ = torch._C._nn._parse_to(*args, **kwargs)
        if dtype is not None and not dtype.is_floating_point:
            raise TypeError(f"dtype is {dtype}, expected a floating-point one")

        def move(tensor: Tensor) -> Tensor:
            keep = dtype is None or not tensor.is_floating_point()
            return tensor.to(device=device, dtype=None if keep else dtype, non_blocking=non_blocking)

        return self._map(move)

    def clone(self) -> TaskBatch:
        """Every tensor copied."""
        return self._map(torch.clone)

    def pin_memory(self) -> TaskBatch:
        """Every tensor in page-locked memory, so that copies to a GPU overlap with work on it."""
        return self._map(Tensor.pin_memory)

    def _map(self, function: Callable[[Tensor], Tensor]) -> TaskBatch:
        """Each tensor's copy elsewhere. Nothing is checked again: reading labels would make a GPU's copy wait."""
        twin = copy.copy(self)
        for name, tensor in self._tensors():
            object.__setattr__(twin, name, function(tensor))
        return twin

    @classmethod
    def from_tasks(cls, tasks: Sequence[Task]) -> TaskBatch:
        """Batch tasks of different sizes: pads each to the largest, and masks the padding.

        Args:
            tasks: (support_x [S_t, ...], support_y [S_t, ...], query_x [Q_t, ...], query_y [Q_t, ...]) for each task.

        Raises:
            TypeError: a member is no tensor, or tasks differ in dtype.
            ValueError: no task, sample shapes or devices that differ between tasks, or a task with more samples than
                targets.

        Examples:
            >>> def task(shots):
            ...     return torch.rand(2 * shots, 8), torch.arange(2).repeat(shots), torch.rand(2, 8), torch.arange(2)
            >>> tasks = innerloop.TaskBatch.from_tasks([task(shots=1), task(shots=2)])
            >>> tasks.support_x.shape, tasks.query_mask
            (torch.Size([2, 4, 8]), None)
            >>> tasks.support_mask
            tensor([[ True,  True, False, False],
                    [ True,  True,  True,  True]])
        """
        if not tasks:
            raise ValueError("tasks is empty: expected at least one (support_x, support_y, query_x, query_y)")
        for index, task in enumerate(tasks):
            if len(task) != 4:
                raise ValueError(
                    f"tasks[{index}] has {len(task)} members, expected support_x, support_y, query_x, query_y"
                )
            for x, y, side in ((task[0], task[1], "support"), (task[2], task[3], "query")):
                _check_pair(f"tasks[{index}]'s {side}", x, y)
        names = ("support_x", "support_y", "query_x", "query_y")
        columns = dict(zip(names, zip(*tasks, strict=True), strict=True))
        return cls(
            **{name: _pad(name, column) for name, column in columns.items()},
            support_mask=_padding_mask(columns["support_x"]),
            query_mask=_padding_mask(columns["query_x"]),
        )


def _check_inputs(support_x: Tensor, query_x: Tensor) -> None:
    for name, x in (("support_x", support_x), ("query_x", query_x)):
        if not x.is_floating_point():
            raise TypeError(f"{name} has dtype {x.dtype}, expected floating point")
        if x.dim() < 2 or x.shape[0] == 0 or x.shape[1] == 0:
            raise ValueError(
                f"{name} has shape {tuple(x.shape)}, expected [T, samples, ...] with T and samples at least 1"
            )
    if query_x.dtype != support_x.dtype:
        raise TypeError(f"query_x has dtype {query_x.dtype}, expected support_x's {support_x.dtype}")
    if query_x.shape[0] != support_x.shape[0]:
        raise ValueError(f"query_x has {query_x.shape[0]} tasks, expected support_x's {support_x.shape[0]}")
    if query_x.shape[2:] != support_x.shape[2:]:
        raise ValueError(
            f"query_x has sample shape {tuple(query_x.shape[2:])}, expected support_x's {tuple(support_x.shape[2:])}"
        )


def _check_targets(side: str, x: Tensor, y: Tensor) -> None:
    if y.shape[:2] != x.shape[:2]:
        raise ValueError(
            f"{side}_y has shape {tuple(y.shape)}, expected to begin with {tuple(x.shape[:2])} as {side}_x does"
        )
    if not y.is_floating_point():
        if y.dtype != torch.int64:
            raise TypeError(f"{side}_y has dtype {y.dtype}, expected int64 labels or floating-point targets")
    elif y.dtype != x.dtype:
        raise TypeError(f"{side}_y has dtype {y.dtype}, expected {side}_x's {x.dtype}")


def _check_mask(side: str, x: Tensor, mask: Tensor) -> None:
    if mask.dtype != torch.bool:
        raise TypeError(f"{side}_mask has dtype {mask.dtype}, expected bool")
    if mask.shape != x.shape[:2]:
        raise ValueError(f"{side}_mask has shape {tuple(mask.shape)}, expected {tuple(x.shape[:2])}")
    empty = (~mask.any(dim=1)).nonzero()
    if len(empty):
        raise ValueError(f"{side}_mask leaves task {int(empty[0])} without a valid sample")


def _check_classes(classes: Tensor, tasks: int, ways: int | None) -> None:
    if ways is None:
        raise ValueError("classes is given, but the targets are no class labels")
    if classes.dtype != torch.int64:
        raise TypeError(f"classes has dtype {classes.dtype}, expected int64")
    if classes.dim() != 2 or classes.shape[0] != tasks or classes.shape[1] < ways:
        raise ValueError(f"classes has shape {tuple(classes.shape)}, expected [T, ways] = ({tasks}, {ways})")
    if int(classes.min()) < 0:
        raise ValueError(f"classes holds {int(classes.min())}, expected numbers from 0")


def _largest_label(side: str, y: Tensor, mask: Tensor | None) -> int:
    valid = y if mask is None else y[mask]
    smallest, largest = (int(bound) for bound in valid.aminmax())
    if smallest < 0:
        raise ValueError(f"{side}_y holds the label {smallest}, expected labels from 0")
    return largest


def _check_pair(what: str, x: Tensor, y: Tensor) -> None:
    """One task's samples and their targets: what padding would hide."""
    for name, tensor in (("x", x), ("y", y)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{what}_{name} must be a torch.Tensor, got {type(tensor).__name__}")
        if tensor.dim() == 0 or len(tensor) == 0:
            raise ValueError(f"{what}_{name} has shape {tuple(tensor.shape)}, expected at least one sample")
    if len(x) != len(y):
        raise ValueError(f"{what}_y has {len(y)} entries, expected {len(x)}, one for each sample")


def _pad(name: str, column: Sequence[Tensor]) -> Tensor:
    for index, tensor in enumerate(column):
        if tensor.dtype != column[0].dtype:
            raise TypeError(f"tasks[{index}]'s {name} has dtype {tensor.dtype}, expected tasks[0]'s {column[0].dtype}")
        if tensor.device != column[0].device:
            raise ValueError(f"tasks[{index}]'s {name} is on {tensor.device}, expected tasks[0]'s {column[0].device}")
    shapes = {tuple(tensor.shape[1:]) for tensor in column}
    if len(shapes) > 1:
        raise ValueError(f"{name} has sample shapes {sorted(shapes)}, expected one shape for all tasks")
    return torch.nn.utils.rnn.pad_sequence(list(column), batch_first=True)


def _padding_mask(column: Sequence[Tensor]) -> Tensor | None:
    sizes = torch.tensor([len(tensor) for tensor in column], device=column[0].device)
    longest = int(sizes.max())
    if bool((sizes == longest).all()):
        return None
    return torch.arange(longest, device=sizes.device) < sizes[:, None]
