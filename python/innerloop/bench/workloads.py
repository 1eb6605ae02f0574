"""What is measured: the meta-gradient of a batch of tasks, for the nets and sizes of the papers' experiments."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from importlib import import_module
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from innerloop import models
from innerloop.data import get as dataset
from innerloop.lowering import NotLowerable, lower
from innerloop.models import Shape
from innerloop.norms import is_batch_norm

Arrays = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


@dataclass(frozen=True)
class Workload:
    """One row of the table.

    Attributes:
        name: on the command line. title: in the table.
        net: what `builder` finds. options: its own. sample: the shape of one sample.
        outputs: of the net; the ways, if it classifies.
        tasks, support, query: T tasks of S + Q samples. steps: K. inner_lr: α.
        loss: "cross_entropy" or "mse". data: where samples come from; "normal" draws them from N(0, 1).
        adapt: "all" parameters, or the last Linear layer, the "head" (ANIL).
        group: the part of the report. "rivals": against everything there is, one thread; "tasks" and "steps": the same
            net with more and fewer tasks or inner steps; "torch": against the torch engine alone.
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
    group: Literal["rivals", "tasks", "steps", "torch"] = "rivals"
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def heading(self) -> str:
        """The title, what is special, and the sizes."""
        variant = {True: ", first order", False: ""}[self.first_order] + (", ANIL" if self.adapt == "head" else "")
        return f"{self.title}{variant}: T={self.tasks}, {self.support}+{self.query}, K={self.steps}"


def perceptron(input_shape: Shape, outputs: int, *, hidden: int = 128) -> nn.Module:
    """`models.mlp` made of modules alone, as some of the rivals need it."""
    layers = {
        "flatten": nn.Flatten(),
        "fc1": nn.Linear(math.prod(input_shape), hidden),
        "relu": nn.ReLU(),
        "fc2": nn.Linear(hidden, outputs),
    }
    return nn.Sequential(OrderedDict(layers))


def builder(net: str) -> Callable[..., nn.Module]:
    """What is called with the shape of a sample, the number of outputs and options: a builder of `innerloop.models` by
    its name, or any function as "module:function".

    Raises:
        LookupError: no such name, or no such function in the module. ImportError: no such module.
    """
    module, colon, function = net.partition(":")
    if not colon:
        return models.build(net)
    found = getattr(import_module(module), function, None)
    if found is None:
        raise LookupError(f"the module {module} has no {function!r}")
    return found


_SINUSOID = Workload(
    "sinusoid-k1", "sinusoid MLP 1-40-40-1", "sinusoid_mlp", (1,), 1, 25, 10, 10, 1, 0.01, loss="mse", data="sinusoid"
)
_OMNIGLOT = Workload(
    *("omniglot-k1", "Omniglot Conv4-64 28×28", "conv4", (1, 28, 28), 5, 32, 5, 75, 1, 0.4), options={"filters": 64}
)
#: The README's first command.
_GLYPHS = Workload(
    *("glyphs-k1", "glyphs Conv4-32 stride 2, 28×28", "conv4", (1, 28, 28), 5, 8, 5, 25, 1, 0.4),
    data="glyphs",
    options={"filters": 32, "downsample": "stride"},
)

WORKLOADS = {
    workload.name: workload
    for workload in [
        _SINUSOID,
        replace(_SINUSOID, name="sinusoid-k5", steps=5),
        Workload("mlp784-k5", "MLP 784-128-5", f"{__name__}:perceptron", (1, 28, 28), 5, 32, 5, 75, 5, 0.01),
        _OMNIGLOT,
        replace(_OMNIGLOT, name="omniglot-k5", steps=5, inner_lr=0.1),
        replace(_OMNIGLOT, name="omniglot-first-order", first_order=True),
        replace(_OMNIGLOT, name="omniglot-anil", adapt="head"),
        Workload(
            *("miniimagenet-k5", "miniImageNet Conv4-32 84×84", "conv4", (3, 84, 84), 5, 4, 25, 75, 5, 0.01),
            options={"filters": 32},
        ),
        _GLYPHS,
        *(
            replace(row, name=f"{row.name.removesuffix('-k1')}-t{tasks}", tasks=tasks, group="tasks")
            for row in (_SINUSOID, _OMNIGLOT)
            for tasks in (1, 4, 16, 32, 100)
        ),
        *(
            replace(row, name=f"{row.name.removesuffix('-k1')}-steps{steps}", steps=steps, inner_lr=0.01, group="steps")
            for row in (_SINUSOID, _GLYPHS)
            for steps in (1, 5, 10, 50, 100)
        ),
    ]
}


def make_model(workload: Workload, dtype: str) -> nn.Module:
    """The net with its initial parameters: always the same ones."""
    torch.manual_seed(0)
    net = builder(workload.net)(workload.sample, workload.outputs, **workload.options)
    return net.to(getattr(torch, dtype))


def has_batch_norm(workload: Workload) -> bool:
    return any(map(is_batch_norm, make_model(workload, "float32").modules()))


def adapted_parameters(workload: Workload, model: nn.Module) -> tuple[str, ...] | None:
    """Their names; None: all."""
    return tuple(name for name, _ in model.named_parameters())[-2:] if workload.adapt == "head" else None


def flops(workload: Workload) -> int | None:
    """Of the products and convolutions that a step needs, a multiply-add counting two; None where the net does not
    lower."""
    model = make_model(workload, "float32")
    try:
        program = lower(model)
    except NotLowerable:
        return None
    sizes = workload.sample, workload.support, workload.query, workload.steps
    cost = program.cost(*sizes, workload.first_order, adapted_parameters(workload, model))
    return cost.flops * workload.tasks


def make_arrays(workload: Workload, dtype: str) -> Arrays:
    """support_x [T, S, *sample], support_y, query_x [T, Q, *sample], query_y; labels [T, ·] int64, balanced, or
    targets [T, ·, outputs]."""
    tasks, samples = workload.tasks, workload.support + workload.query
    if workload.data == "normal":
        random = np.random.default_rng(1)
        x = random.standard_normal((tasks, samples, *workload.sample))
        if workload.loss == "mse":
            y = random.standard_normal((tasks, samples, workload.outputs))
        else:
            y = np.broadcast_to(np.arange(samples) % workload.outputs, (tasks, samples))
        both = [(x[:, part], y[:, part]) for part in (slice(workload.support), slice(workload.support, None))]
    else:
        shots, queries = workload.support // workload.outputs, workload.query // workload.outputs
        batch = dataset(workload.data).sample(tasks, workload.outputs, shots, queries, seed=1)
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
