"""Algorithms that learn an embedding, or transfer one, or adapt a network: a small problem that each of them can learn,
and its options.

Another algorithm is another line of CASES.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import innerloop
from innerloop import Algorithm, TaskBatch
from innerloop.data.class_dataset import ClassDataset
from innerloop.training import LATEST, TrainingSettings, fit

SHAPE = (1, 8, 8)
TRAINING_CLASSES = 24


@dataclass(frozen=True)
class Case:
    """An algorithm by name with its options, and the tasks of a short training; ways: of its head, if it has one."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=lambda: EPISODES)
    learns: bool = True
    ways: int | None = None

    @property
    def id(self) -> str:
        return "-".join([self.name, *(f"{key}={value}" for key, value in self.options.items())])


EPISODES = {"steps": 40, "meta_batch_size": 2, "ways": 5, "shots": 1, "queries": 3, "lr": 0.01}
MORE_EPISODES = {**EPISODES, "steps": 150}
MINIBATCHES = {"steps": 40, "meta_batch_size": 16, "ways": 1, "shots": 1, "queries": 1, "lr": 0.01}

CASES = [
    Case("protonet"),
    Case("protonet", {"metric": "euclidean"}),
    Case("protonet", {"metric": "cosine", "temperature": 0.1}),
    Case("matching_net"),
    Case("matching_net", {"full_context": True, "reads": 2}),
    Case("metaoptnet"),
    Case("metaoptnet", {"head": "ridge"}),
    Case("r2d2"),
    Case("relation_net", training=MORE_EPISODES),
    Case("relation_net", {"pooling": "sum"}, MORE_EPISODES),
    Case("baseline", training=MINIBATCHES),
    Case("baseline_pp", training=MINIBATCHES),
    Case("simpleshot", training=MINIBATCHES),
    Case("simpleshot", {"transform": "un"}, MINIBATCHES),
    Case("finetune", {"inner_steps": 3, "inner_lr": 0.1}, MINIBATCHES),
    Case("finetune", {"inner_steps": 3, "pretraining": "none"}, learns=False),
    Case("maml_pp", {"inner_steps": 2}, {**MORE_EPISODES, "ways": 3}, ways=3),
]


def data() -> ClassDataset:
    """Images of 36 classes, 18 each: a random pattern in one half, which is the class, and noise in both."""
    random = np.random.default_rng(0)
    patterns = np.zeros((36, 1, 8, 8))
    patterns[..., :4] = random.standard_normal((36, 1, 8, 4))
    noise = random.standard_normal((36, 18, 8, 8)) * np.repeat([0.6, 2.0], 4)
    images = (128 + 24 * (patterns + noise)).clip(0, 255).astype(np.uint8).reshape(-1, 8, 8)
    splits = {"train": np.arange(TRAINING_CLASSES), "val": np.arange(24, 30), "test": np.arange(24, 36)}
    return ClassDataset(images, [18] * 36, [str(index) for index in range(36)], splits)


def build(case: Case, dropout: float = 0.0) -> Algorithm:
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), nn.Dropout(dropout)]
    if case.ways is not None:
        layers += [nn.Flatten(), nn.Linear(8 * 4 * 4, case.ways)]
    model = nn.Sequential(*layers)
    cls = innerloop.get(case.name)
    known = {"input_shape": SHAPE, "training_classes": TRAINING_CLASSES}
    facts = {name: value for name, value in known.items() if name in inspect.signature(cls).parameters}
    return cls(model, **facts, **case.options)


def assert_resumes_bit_for_bit(make: Callable[[], Algorithm], training: dict[str, Any], folder: Path) -> None:
    """A training that dies after its last checkpoint and is resumed ends with the bits of one that does not die.

    Args:
        make: builds the algorithm, of 3 ways if it has a head. training: settings. folder: for the runs.
    """
    settings = TrainingSettings(**{**training, "steps": 6, "validate_every": 3, "validation_episodes": 4})

    def train(run: str, **options: Any) -> dict[str, Tensor]:
        part = data()
        fit(
            make(), part.split("train"), settings=settings, validation=part.split("val"), validation_ways=3,
            run=folder / run, **options,
        )  # fmt: skip
        return load_file(folder / run / LATEST)

    class Killed(Exception):
        pass

    def die(done: int, result: object) -> None:
        if done == 5:
            raise Killed

    undisturbed = train("undisturbed")
    with pytest.raises(Killed):
        train("disturbed", progress=die)
    resumed = train("disturbed", resume=True)
    assert undisturbed.keys() == resumed.keys()
    assert all(torch.equal(value, resumed[key]) for key, value in undisturbed.items())


def ragged() -> TaskBatch:
    """Two 3-way tasks, of which the first has fewer support samples, in no order, and the second fewer queries."""
    whole = data().split("train").sample(2, ways=3, shots=3, queries=4, seed=1)
    keep = ([4, 0, 8, 1], [7, 2, 3, 6, 0, 5, 1, 8, 4])
    ask = (list(range(12)), [2, 9, 5, 11, 0])
    return TaskBatch.from_tasks(
        [
            (
                whole.support_x[t][keep[t]],
                whole.support_y[t][keep[t]],
                whole.query_x[t][ask[t]],
                whole.query_y[t][ask[t]],
            )
            for t in range(2)
        ]
    )
