"""What is measured: the meta-gradient of a batch of tasks, for the nets and sizes of the papers' experiments."""

from __future__ import annotations

import math
import sys
from collections import OrderedDict
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import nn

import innerloop
from innerloop.models import build

Arrays = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


@dataclass(frozen=True)
class Workload:
    """One row of the table.

    Attributes:
        name: on the command line. title: in the table.
        net: a key of NETS. sample: the shape of one sample. outputs: of the net; the ways, if it classifies.
        tasks, support, query: T tasks of S + Q samples. steps: K. inner_lr: α.
        loss: "cross_entropy" or "mse". data: where samples come from; "normal" draws them from N(0, 1).
        adapt: "all" parameters, or the last Linear layer, the "head" (ANIL).
        group: the part of the report. "rivals": against everything there is, one thread; "tasks": the same net with
            more and fewer tasks; "torch": against the torch engine alone.
    """

    name: str
    title: str
    net: str
    sample: tuple[int, ...]
    outputs: int
    tasks: int
    support: int
    query: int
    steps: int
    inner_lr: float
    loss: Literal["cross_entropy", "mse"] = "cross_entropy"
    data: Literal["normal", "glyphs", "sinusoid"] = "normal"
    adapt: Literal["all", "head"] = "all"
    first_order: bool = False
    group: Literal["rivals", "tasks", "torch"] = "rivals"

    @property
    def is_convolutional(self) -> bool:
        return self.net.startswith(("conv4", "resnet12"))


def _normal_mlp() -> nn.Module:
    layers = {"flatten": nn.Flatten(), "fc1": nn.Linear(784, 128), "relu": nn.ReLU(), "fc2": nn.Linear(128, 5)}
    return nn.Sequential(OrderedDict(layers))


def _resnet12() -> nn.Module:
    sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
    from resnet12 import ResNet12

    return ResNet12()


NETS = {
    "1-40-40-1": lambda: build("sinusoid_mlp")(),
    "784-128-5": _normal_mlp,
    "conv4-64": lambda: build("conv4")((1, 28, 28), 5, filters=64),
    "conv4-32": lambda: build("conv4")((3, 84, 84), 5, filters=32),
    "conv4-32-stride": lambda: build("conv4")((1, 28, 28), 5, filters=32, downsample="stride"),
    "resnet12": _resnet12,
}

_SINUSOID = Workload(
    "sinusoid-k1", "sinusoid MLP 1-40-40-1", "1-40-40-1", (1,), 1, 25, 10, 10, 1, 0.01, loss="mse", data="sinusoid"
)
_OMNIGLOT = Workload("omniglot-k1", "Omniglot Conv4-64 28×28", "conv4-64", (1, 28, 28), 5, 32, 5, 75, 1, 0.4)

WORKLOADS = {
    workload.name: workload
    for workload in [
        _SINUSOID,
        replace(_SINUSOID, name="sinusoid-k5", steps=5),
        Workload("mlp784-k5", "MLP 784-128-5", "784-128-5", (1, 28, 28), 5, 32, 5, 75, 5, 0.01),
        _OMNIGLOT,
        replace(_OMNIGLOT, name="omniglot-k5", steps=5, inner_lr=0.1),
        replace(_OMNIGLOT, name="omniglot-first-order", first_order=True),
        replace(_OMNIGLOT, name="omniglot-anil", adapt="head"),
        Workload("miniimagenet-k5", "miniImageNet Conv4-32 84×84", "conv4-32", (3, 84, 84), 5, 4, 25, 75, 5, 0.01),
        # The README's first command.
        Workload(
            *("glyphs-k1", "glyphs Conv4-32 stride 2, 28×28", "conv4-32-stride", (1, 28, 28), 5, 8, 5, 25, 1, 0.4),
            data="glyphs",
        ),
        Workload(
            "resnet12-k1",
            "ResNet-12 84×84, 5-way 5-shot",
            "resnet12",
            (3, 84, 84),
            5,
            2,
            25,
            75,
            1,
            0.01,
            group="torch",
        ),
        *(
            replace(row, name=f"{row.name.removesuffix('-k1')}-t{tasks}", tasks=tasks, group="tasks")
            for row in (_SINUSOID, _OMNIGLOT)
            for tasks in (1, 4, 16, 32, 100)
        ),
    ]
}


def make_model(workload: Workload, dtype: str) -> nn.Module:
    """The net with its initial parameters: always the same ones."""
    torch.manual_seed(0)
    return NETS[workload.net]().to(getattr(torch, dtype))


def make_arrays(workload: Workload, dtype: str) -> Arrays:
    """support_x [T, S, *sample], support_y, query_x [T, Q, *sample], query_y; labels [T, ·] int64, balanced."""
    tasks, samples = workload.tasks, workload.support + workload.query
    if workload.data == "normal":
        random = np.random.default_rng(1)
        x = random.standard_normal((tasks, samples, *workload.sample))
        y = np.broadcast_to(np.arange(samples) % workload.outputs, (tasks, samples))
        both = [(x[:, part], y[:, part]) for part in (slice(workload.support), slice(workload.support, None))]
    else:
        shots, queries = workload.support // workload.outputs, workload.query // workload.outputs
        batch = innerloop.data.get(workload.data).sample(tasks, workload.outputs, shots, queries, seed=1)
        both = [
            (batch.support_x.numpy(), batch.support_y.numpy()),
            (batch.query_x.numpy(), batch.query_y.numpy()),
        ]
    (support_x, support_y), (query_x, query_y) = (
        (np.ascontiguousarray(x, dtype), np.ascontiguousarray(y, dtype if workload.loss == "mse" else np.int64))
        for x, y in both
    )
    assert math.prod(support_y.shape[:2]) == tasks * workload.support
    return support_x, support_y, query_x, query_y
