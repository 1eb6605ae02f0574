"""The native task sampler: its random numbers, and the tasks drawn with them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from innerloop import TaskBatch, _native
from innerloop.data.class_dataset import ClassDataset


# Known answers of philox4x32-10 (kat_vectors of Random123).
@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_philox(counter: list[int], key: list[int], expected: list[int]) -> None:
    assert _native.philox(counter, key) == expected


SIZES = [7, 9, 30, 8, 12, 7]
STARTS = np.concatenate(([0], np.cumsum(SIZES)))


def draw(tasks: int, *, seed: int = 3, first_task: int = 0, **changed: Any) -> tuple[np.ndarray, np.ndarray]:
    arguments: dict[str, Any] = {"starts": STARTS, "classes": np.arange(6), "ways": 4, "shots": 2, "queries": 5}
    return _native.sample_tasks(**{**arguments, **changed}, seed=seed, first_task=first_task, tasks=tasks)


def test_shapes_and_order() -> None:
    support, query = draw(10)
    assert (support.shape, support.dtype) == ((10, 8), np.int64)
    assert query.shape == (10, 20)
    # class by class: the classes of a task's support and query blocks agree, and differ from one another
    support_class = np.searchsorted(STARTS, support, side="right").reshape(10, 4, 2)
    query_class = np.searchsorted(STARTS, query, side="right").reshape(10, 4, 5)
    assert (support_class == support_class[:, :, :1]).all()
    assert (query_class == support_class[:, :, :1]).all()
    assert all(len(set(row)) == 4 for row in support_class[:, :, 0])


def test_samples_are_drawn_without_replacement() -> None:
    support, query = draw(200)
    for row in np.concatenate((support, query), axis=1):
        assert len(set(row)) == 28


def test_only_the_classes_asked_for() -> None:
    support, _ = draw(100, classes=np.array([4, 2]), ways=2)
    assert set(np.searchsorted(STARTS, support.ravel(), side="right") - 1) == {2, 4}


@pytest.mark.parametrize(("first_task", "tasks"), [(0, 1), (0, 7), (5, 20), (37, 3)])
def test_a_task_is_the_same_in_whatever_batch(first_task: int, tasks: int) -> None:
    everything, part = draw(40), draw(tasks, first_task=first_task)
    for whole, piece in zip(everything, part, strict=True):
        np.testing.assert_array_equal(piece, whole[first_task : first_task + tasks])


def test_seeds_and_far_tasks_differ() -> None:
    rows = [draw(1, seed=seed, first_task=first)[1] for seed in (0, 1, 2**63) for first in (0, 1, 2**32, 2**40)]
    assert len({row.tobytes() for row in rows}) == len(rows)


class Stream(TorchDataset[TaskBatch]):
    """One task after another, as a DataLoader's map-style data set."""

    def __init__(self, dataset: ClassDataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> TaskBatch:
        return self.dataset.sample(1, ways=4, shots=2, queries=5, seed=3, first_task=index)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("workers", [0, 2])
def test_a_task_is_the_same_whatever_the_number_of_workers(workers: int) -> None:
    dataset = ClassDataset(np.arange(73, dtype=np.float32)[:, None], SIZES, list("abcdef"))
    loader = DataLoader(
        Stream(dataset), batch_size=None, num_workers=workers, multiprocessing_context="fork" if workers else None
    )
    whole = dataset.sample(12, ways=4, shots=2, queries=5, seed=3)
    drawn = list(loader)
    assert torch.equal(torch.cat([tasks.support_x for tasks in drawn]), whole.support_x)
    assert torch.equal(torch.cat([tasks.query_x for tasks in drawn]), whole.query_x)


def is_uniform(values: np.ndarray, bins: int) -> bool:
    return bool(stats.chisquare(np.bincount(values.ravel(), minlength=bins)).pvalue > 1e-4)


def test_uniform() -> None:
    """Classes, their positions in a task, samples as support and as query: each equally often."""
    support, query = draw(60_000, starts=np.arange(7) * 10, ways=3, shots=1, queries=2, seed=11)
    assert is_uniform(support // 10, 6)
    for way in range(3):
        assert is_uniform(support[:, way] // 10, 6)
    assert is_uniform(support % 10, 10)
    assert is_uniform(query % 10, 10)
    pairs = (support[:, 0] // 10) * 6 + support[:, 1] // 10  # ordered pairs of different classes
    counts = np.bincount(pairs, minlength=36).reshape(6, 6)
    assert (np.diag(counts) == 0).all()
    assert stats.chisquare(counts[~np.eye(6, dtype=bool)]).pvalue > 1e-4


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"ways": 0}, "ways is 0, expected 1 … 6, the number of classes"),
        ({"ways": 7}, "ways is 7, expected 1 … 6, the number of classes"),
        ({"shots": -1}, "shots and queries must be at least 0"),
        ({"shots": 2**62, "queries": 2**62}, "shots . queries is too large"),
        ({"shots": 3}, "class 0 has 7 samples, but shots . queries is 8"),
        ({"classes": np.array([6])}, "classes holds 6, expected 0 … 5"),
        ({"classes": np.array([-1])}, "classes holds -1"),
        ({"classes": np.zeros((2, 2), np.int64)}, "classes must have one dimension"),
        ({"starts": np.array([0, 5, 3])}, "starts must not decrease"),
        ({"starts": np.array([], np.int64)}, "starts must begin with"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_refused(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        draw(1, **changed)


def test_a_number_of_tasks_that_fits_no_memory_is_refused() -> None:
    with pytest.raises(ValueError, match="tasks would be too large"):
        draw(2**60)
    with pytest.raises(ValueError, match="tasks is -1"):
        draw(-1)
