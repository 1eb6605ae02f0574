"""Tasks drawn per second: the native sampler, plain numpy, and learn2learn's TaskDataset.

    benchmarks/peers.sh learn2learn && .cache/peers/learn2learn/bin/python benchmarks/sampler.py [--save]

A task is 5-way 1-shot with 15 queries a class, drawn from the training classes of glyphs (images in memory for all), as
float32 tensors of images and labels that a model can take. One thread, CPU time, the rows interleaved, median of the
rounds. The last rows draw indices alone. --save writes benchmarks/results/sampler.json. By another Python, without
learn2learn, its row says so.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

import innerloop
from machine import describe
from rivals.importing import skip_umbrella

HERE = Path(__file__).parent
WAYS, SHOTS, QUERIES = 5, 1, 15
BATCH = 32
ROUNDS = 9
SECONDS = 0.3  # of a row in a round

Draw = Callable[[], object]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/sampler.json")
    save = parser.parse_args().save
    torch.set_num_threads(1)
    data = innerloop.data.get("glyphs").split("train").compact()
    rows = {**innerloop_rows(data), **numpy_rows(data)}
    missing = None
    try:
        rows |= learn2learn_row(data)
    except ModuleNotFoundError as error:
        missing = str(error)
    speeds = measure(rows)
    report(speeds, missing)
    if save:
        peers = {} if missing else {"learn2learn": version("learn2learn")}
        record = {
            "task": {"ways": WAYS, "shots": SHOTS, "queries": QUERIES, "data": "glyphs, train", "threads": 1},
            "tasks_per_cpu_second": {name: round(speed) for name, speed in speeds.items()},
            "machine": describe() | peers,
        }
        target = HERE / "results" / "sampler.json"
        target.parent.mkdir(exist_ok=True)
        target.write_text(json.dumps(record, indent=1) + "\n")


class Ready(Dataset[tuple[Tensor, int]]):
    """Images and labels that cost nothing to get."""

    def __init__(self, pairs: list[tuple[Tensor, int]]) -> None:
        self.pairs = pairs

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.pairs[index]


def innerloop_rows(data: Any) -> dict[str, tuple[int, Draw]]:
    """Name → (tasks a call, the call)."""
    numbers = iter(range(10**12))

    def sample(tasks: int) -> object:
        return data.sample(tasks, WAYS, SHOTS, QUERIES, seed=0, first_task=tasks * next(numbers))

    def indices(tasks: int) -> object:
        return data.sample_indices(tasks, WAYS, SHOTS, QUERIES, seed=0, first_task=tasks * next(numbers))

    return {
        f"innerloop, {BATCH} tasks a call": (BATCH, lambda: sample(BATCH)),
        "innerloop, one task a call": (1, lambda: sample(1)),
        f"indices: innerloop, {BATCH} tasks a call": (BATCH, lambda: indices(BATCH)),
        "indices: innerloop, one task a call": (1, lambda: indices(1)),
    }


def numpy_rows(data: Any) -> dict[str, tuple[int, Draw]]:
    """What one writes by hand: with a loop over the classes of a task, or without where all have as many samples."""
    random = np.random.default_rng(0)
    samples = len(data.class_examples(0))
    starts = np.arange(data.num_classes) * samples
    labels = torch.arange(WAYS)
    support_y, query_y = labels.repeat_interleave(SHOTS), labels.repeat_interleave(QUERIES)

    def looped() -> np.ndarray:
        classes = random.choice(data.num_classes, WAYS, replace=False)
        return np.stack([starts[c] + random.choice(samples, SHOTS + QUERIES, replace=False) for c in classes])

    def vectorised() -> np.ndarray:
        classes = random.choice(data.num_classes, WAYS, replace=False)
        order = random.random((WAYS, samples)).argsort(axis=1)[:, : SHOTS + QUERIES]
        return starts[classes][:, None] + order

    def task(indices: np.ndarray) -> object:
        support, query = (
            torch.from_numpy(data.examples[part.ravel()])[:, None].to(torch.float32).div_(255)
            for part in (indices[:, :SHOTS], indices[:, SHOTS:])
        )
        return support, support_y, query, query_y

    return {
        "numpy, a loop over classes": (1, lambda: task(looped())),
        "numpy, no loop": (1, lambda: task(vectorised())),
        "indices: numpy, a loop over classes": (1, looped),
        "indices: numpy, no loop": (1, vectorised),
    }


def learn2learn_row(data: Any) -> dict[str, tuple[int, Draw]]:
    """Its TaskDataset, by its newer name, over tensors that are ready to be stacked.

    Raises:
        ModuleNotFoundError: learn2learn is not installed.
    """
    skip_umbrella("learn2learn")
    from learn2learn.data import MetaDataset, Taskset
    from learn2learn.data.transforms import ConsecutiveLabels, KShots, LoadData, NWays, RemapLabels

    labels = np.repeat(np.arange(data.num_classes), len(data.class_examples(0))).tolist()
    images = MetaDataset(Ready(list(zip(data.to_input(data.examples), labels, strict=True))))
    transforms = [
        NWays(images, WAYS),
        KShots(images, SHOTS + QUERIES),
        LoadData(images),
        RemapLabels(images),
        ConsecutiveLabels(images),
    ]
    tasks = Taskset(images, task_transforms=transforms, num_tasks=-1)
    is_support = torch.zeros(WAYS * (SHOTS + QUERIES), dtype=torch.bool)
    is_support[:: SHOTS + QUERIES] = True

    def sample() -> object:
        x, y = tasks.sample()
        return x[is_support], y[is_support], x[~is_support], y[~is_support]

    return {"learn2learn TaskDataset": (1, sample)}


def measure(rows: dict[str, tuple[int, Draw]]) -> dict[str, float]:
    """Tasks per CPU second of each row."""
    speeds: dict[str, list[float]] = {name: [] for name in rows}
    for _ in range(ROUNDS):
        for name, (tasks, draw) in rows.items():
            draw()
            calls, start = 0, time.process_time()
            while (elapsed := time.process_time() - start) < SECONDS:
                draw()
                calls += 1
            speeds[name].append(calls * tasks / elapsed)
    return {name: median(values) for name, values in speeds.items()}


def report(speeds: dict[str, float], missing: str | None) -> None:
    print(f"{WAYS}-way {SHOTS}-shot, {QUERIES} queries a class: tasks per CPU second, one thread")
    for name, speed in speeds.items():
        print(f"{name:45} {speed:10,.0f}")
    if missing:
        print(f"{'learn2learn TaskDataset':45} {'missing':>10}  ({missing})")


if __name__ == "__main__":
    main()
