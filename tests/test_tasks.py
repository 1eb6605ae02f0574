"""TaskBatch: what it accepts, what it refuses in which words, and what comes out of it."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor

from innerloop import TaskBatch


def batch(**changed: Any) -> TaskBatch:
    """Three tasks of two classes, one support and two query samples a class; arguments may be replaced."""
    arguments: dict[str, Any] = {
        "support_x": torch.arange(3 * 2 * 4.0).reshape(3, 2, 4),
        "support_y": torch.tensor([[0, 1]] * 3),
        "query_x": torch.arange(3 * 4 * 4.0).reshape(3, 4, 4),
        "query_y": torch.tensor([[0, 0, 1, 1]] * 3),
    }
    return TaskBatch(**{**arguments, **changed})


def regression(**changed: Any) -> TaskBatch:
    return batch(**{"support_y": torch.zeros(3, 2, 1), "query_y": torch.zeros(3, 4, 1), **changed})


def mask(*rows: list[int]) -> Tensor:
    return torch.tensor(rows, dtype=torch.bool)


ALL_BUT_ONE = mask([1, 1, 1, 1], [1, 1, 1, 1], [0, 0, 0, 0])


@pytest.mark.parametrize(
    ("make", "changed", "error", "message"),
    [
        (batch, {"support_x": [[1.0]]}, TypeError, "support_x must be a torch.Tensor, got list"),
        (batch, {"query_y": None}, TypeError, "query_y must be a torch.Tensor, got NoneType"),
        (batch, {"support_x": torch.zeros(3, 2, 4, dtype=torch.int64)}, TypeError, "support_x has dtype torch.int64"),
        (batch, {"query_x": torch.zeros(3, 4, 4, dtype=torch.float64)}, TypeError, "query_x has dtype torch.float64"),
        (batch, {"support_x": torch.zeros(3)}, ValueError, r"support_x has shape \(3,\)"),
        (batch, {"support_x": torch.zeros(0, 2, 4)}, ValueError, r"support_x has shape \(0, 2, 4\)"),
        (batch, {"query_x": torch.zeros(3, 0, 4)}, ValueError, r"query_x has shape \(3, 0, 4\)"),
        (batch, {"query_x": torch.zeros(2, 4, 4)}, ValueError, "query_x has 2 tasks, expected support_x's 3"),
        (batch, {"query_x": torch.zeros(3, 4, 5)}, ValueError, r"query_x has sample shape \(5,\), expected .*\(4,\)"),
        (batch, {"support_y": torch.tensor([[0, 1]])}, ValueError, r"support_y has shape \(1, 2\).*\(3, 2\)"),
        (batch, {"query_y": torch.zeros(3, 3).long()}, ValueError, r"query_y has shape \(3, 3\).*\(3, 4\)"),
        (batch, {"query_y": torch.zeros(3, 4).int()}, TypeError, "query_y has dtype torch.int32, expected int64"),
        (batch, {"query_y": torch.zeros(3, 4)}, TypeError, "query_y has dtype torch.float32 but support_y torch.int64"),
        (batch, {"support_y": torch.tensor([[0, -1]] * 3)}, ValueError, "support_y holds the label -1"),
        (batch, {"query_y": torch.tensor([[0, 0, 1, -100]] * 3)}, ValueError, "query_y holds the label -100"),
        (regression, {"support_y": torch.zeros(3, 2)}, ValueError, r"query_y has target shape \(1,\).*\(\)"),
        (regression, {"query_y": torch.zeros(3, 4)}, ValueError, r"query_y has target shape \(\).*\(1,\)"),
        (regression, {"support_y": torch.zeros(3, 2, 1).double()}, TypeError, "support_y has dtype torch.float64"),
        (batch, {"support_mask": torch.ones(3, 2)}, TypeError, "support_mask has dtype torch.float32, expected bool"),
        (batch, {"support_mask": mask([1, 1])}, ValueError, r"support_mask has shape \(1, 2\), expected \(3, 2\)"),
        (batch, {"query_mask": ALL_BUT_ONE}, ValueError, "query_mask leaves task 2 without a valid sample"),
        (batch, {"query_x": torch.zeros(3, 4, 4, device="meta")}, ValueError, "query_x is on meta, expected .* cpu"),
        (batch, {"support_mask": torch.ones(3, 2, dtype=torch.bool, device="meta")}, ValueError, "support_mask is on"),
        (batch, {"classes": torch.zeros(3, 2)}, TypeError, "classes has dtype torch.float32, expected int64"),
        (batch, {"classes": torch.tensor([[4]] * 3)}, ValueError, r"classes has shape \(3, 1\), .*\(3, 2\)"),
        (batch, {"classes": torch.tensor([[4, 5]])}, ValueError, r"classes has shape \(1, 2\), .*\(3, 2\)"),
        (batch, {"classes": torch.tensor([[4, -1]] * 3)}, ValueError, "classes holds -1, expected numbers from 0"),
        (regression, {"classes": torch.tensor([[4, 5]] * 3)}, ValueError, "classes is given, but the targets"),
    ],
)  # fmt: skip
def test_refused(make: Any, changed: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make(**changed)


def test_properties() -> None:
    tasks = batch()
    assert (tasks.num_tasks, len(tasks), tasks.ways) == (3, 3, 2)
    assert tasks.is_classification
    assert tasks.device == torch.device("cpu")


def test_ways_count_the_labels_of_both_sets_and_only_the_valid_ones() -> None:
    labels = torch.tensor([[0, 0, 1, 7]] * 3)
    assert batch(query_y=labels).ways == 8
    assert batch(query_y=labels, query_mask=mask([1, 1, 1, 0]).expand(3, 4)).ways == 2


def test_a_padded_label_is_not_read() -> None:
    labels = torch.tensor([[0, 1, -1, -1]] * 3)
    assert batch(query_y=labels, query_mask=mask([1, 1, 0, 0]).expand(3, 4)).ways == 2


def test_regression_has_no_ways() -> None:
    tasks = regression()
    assert not tasks.is_classification
    with pytest.raises(ValueError, match="ways is defined for class labels only"):
        _ = tasks.ways


@pytest.mark.parametrize(
    ("index", "chosen"),
    [
        (0, [0]),
        (-1, [2]),
        (torch.tensor(1), [1]),
        (slice(1, None), [1, 2]),
        ([2, 0], [2, 0]),
        (torch.tensor([1, 1]), [1, 1]),
        (torch.tensor([True, False, True]), [0, 2]),
    ],
    ids=str,
)
def test_indexing_keeps_the_leading_dimension_and_the_masks(index: Any, chosen: list[int]) -> None:
    masks = mask([1, 1, 1, 0], [1, 1, 0, 0], [1, 0, 0, 0])
    tasks = batch(query_mask=masks)[index]
    assert tasks.num_tasks == len(chosen)
    assert torch.equal(tasks.support_x, batch().support_x[chosen])
    assert tasks.query_mask is not None
    assert torch.equal(tasks.query_mask, masks[chosen])


@pytest.mark.parametrize("index", [3, -4])
def test_index_out_of_range(index: int) -> None:
    with pytest.raises(IndexError, match=f"task {index} of a batch of 3"):
        batch()[index]


def test_iteration_gives_single_tasks() -> None:
    tasks = batch()
    singles = list(tasks)
    assert [single.num_tasks for single in singles] == [1, 1, 1]
    assert torch.equal(torch.cat([single.query_x for single in singles]), tasks.query_x)


def test_classes_stay_with_their_tasks() -> None:
    tasks = batch(classes=torch.tensor([[4, 5], [6, 7], [8, 9]]))
    assert tasks[1].classes.tolist() == [[6, 7]]
    assert tasks.to(torch.float64).classes.tolist() == tasks.classes.tolist()


def test_ways_of_a_part_are_its_own() -> None:
    tasks = batch(query_y=torch.tensor([[0, 0, 1, 1], [0, 1, 2, 3], [0, 0, 0, 1]]))
    assert [single.ways for single in tasks] == [2, 4, 2]


def test_to_converts_inputs_and_targets_never_labels_or_masks() -> None:
    tasks = batch(support_mask=torch.ones(3, 2, dtype=torch.bool)).to(torch.float64)
    assert tasks.support_x.dtype == tasks.query_x.dtype == torch.float64
    assert tasks.support_y.dtype == torch.int64
    assert tasks.support_mask is not None
    assert tasks.support_mask.dtype == torch.bool
    assert tasks.ways == 2
    assert regression().to(dtype=torch.float64).query_y.dtype == torch.float64


def test_to_moves_every_tensor() -> None:
    moved = batch(query_mask=torch.ones(3, 4, dtype=torch.bool)).to("meta")
    assert moved.query_mask is not None
    assert {moved.support_x.device.type, moved.query_y.device.type, moved.query_mask.device.type} == {"meta"}
    assert moved.ways == 2  # known without reading the labels again


def test_to_refuses_a_dtype_for_labels() -> None:
    with pytest.raises(TypeError, match=r"dtype is torch\.int64, expected a floating-point one"):
        batch().to(torch.int64)


def test_pin_memory(cuda: torch.device) -> None:
    tasks = batch().pin_memory()
    assert tasks.support_x.is_pinned()
    assert tasks.query_y.is_pinned()
    assert tasks.to(cuda, non_blocking=True).device.type == "cuda"


@pytest.mark.parametrize("clone", [copy.copy, copy.deepcopy, lambda tasks: pickle.loads(pickle.dumps(tasks))])
def test_copies(clone: Any) -> None:
    twin = clone(batch())
    assert twin.ways == 2
    assert torch.equal(twin.query_x, batch().query_x)


def task(support: int, query: int, value: float = 1.0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        torch.full((support, 4), value),
        torch.arange(support),
        torch.full((query, 4), value),
        torch.arange(query) % support,
    )


def test_from_tasks_pads_and_masks() -> None:
    tasks = TaskBatch.from_tasks([task(2, 3, 1.0), task(4, 1, 2.0)])
    assert tasks.support_x.shape == (2, 4, 4)
    assert tasks.query_y.shape == (2, 3)
    assert tasks.support_mask is not None
    assert tasks.query_mask is not None
    assert torch.equal(tasks.support_mask, mask([1, 1, 0, 0], [1, 1, 1, 1]))
    assert torch.equal(tasks.query_mask, mask([1, 1, 1], [1, 0, 0]))
    for number, (original, single) in enumerate(zip([task(2, 3, 1.0), task(4, 1, 2.0)], tasks, strict=True)):
        assert single.support_mask is not None
        assert torch.equal(single.support_x[single.support_mask], original[0]), number
        assert torch.equal(single.support_y[single.support_mask], original[1]), number
    assert [single.ways for single in tasks] == [2, 4]


def test_from_tasks_of_one_size_needs_no_mask() -> None:
    tasks = TaskBatch.from_tasks([task(2, 3), task(2, 3)])
    assert tasks.support_mask is None
    assert tasks.query_mask is None


def replaced(position: int, value: Any) -> list[Any]:
    """Two tasks, of which the second has another member at a position."""
    members: list[Any] = list(task(2, 3))
    members[position] = value
    return [task(2, 3), tuple(members)]


@pytest.mark.parametrize(
    ("tasks", "error", "message"),
    [
        ([], ValueError, "tasks is empty"),
        ([task(2, 3)[:3]], ValueError, r"tasks\[0\] has 3 members"),
        (replaced(0, [[1.0]]), TypeError, r"tasks\[1\]'s support_x must be a torch.Tensor, got list"),
        (replaced(1, torch.arange(1)), ValueError, r"tasks\[1\]'s support_y has 1 entries, expected 2"),
        (replaced(3, torch.arange(4)), ValueError, r"tasks\[1\]'s query_y has 4 entries, expected 3"),
        (replaced(0, torch.zeros(0, 4)), ValueError, r"tasks\[1\]'s support_x has shape \(0, 4\)"),
        (replaced(2, torch.zeros(3, 5)), ValueError, r"query_x has sample shapes \[\(4,\), \(5,\)\]"),
        (replaced(0, torch.zeros(2, 4).double()), TypeError, r"tasks\[1\]'s support_x has dtype torch.float64"),
        (replaced(2, torch.zeros(3, 4, device="meta")), ValueError, r"tasks\[1\]'s query_x is on meta"),
    ],
)
def test_from_tasks_refuses(tasks: list[Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        TaskBatch.from_tasks(tasks)
