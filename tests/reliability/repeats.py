"""The same bits: from run to run, for any number of threads, and from many Python threads at once."""

from __future__ import annotations

import copy
import threading
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

import innerloop
from innerloop import TaskBatch
from innerloop.options import options_of
from innerloop.runs import Choice, RunConfig
from innerloop.training import TrainingSettings, fit

#: Where the engine is native and yet a part of a step is torch's: pretraining, and prototypes of embeddings.
PARTLY_TORCH = ("finetune", "proto_maml")

#: Options beside the defaults that keep a training of 3 steps short.
OPTIONS: Mapping[str, Mapping[str, Any]] = {
    "maml_pp": {"inner_steps": 2},
    "imaml": {"inner_steps": 4},
    "finetune": {"inner_steps": 2},
    "learned_optimizer": {"inner_steps": 4},
}


def trained(algorithm: str, options: Mapping[str, Any], threads: int) -> Tensor:
    """All parameters and buffers after three steps on glyphs, from one seed."""
    embeds = not innerloop.get(algorithm).needs_head
    # The relation module convolves feature maps.
    conv4 = {"filters": 8, **({"halvings": 2} if algorithm == "relation_net" else {})}
    model = Choice("conv4", conv4) if algorithm != "learned_optimizer" else Choice("mlp", {})
    config = RunConfig(
        algorithm=Choice(algorithm, options),
        model=model,
        data=Choice("glyphs", {}),
        training=TrainingSettings(steps=3, meta_batch_size=4, queries=3, ways=6 if embeds else 5, threads=threads),
        evaluation_ways=5,
        episodes=2,
    )
    dataset = config.dataset()
    module = config.build(dataset)
    fit(module, dataset.split("train"), settings=config.training)
    return torch.cat([value.detach().flatten().double() for value in module.state_dict().values()])


def table(runs: int, threads: tuple[int, ...]) -> tuple[list[tuple[str, str, list[str]]], list[str]]:
    """Rows (algorithm, engine, for each number of threads and for all of them together whether the bits are the same),
    and what should be and is not: a run that is not repeatable, or a native engine for which threads matter."""
    rows, failures = [], []
    for plugin in innerloop.registry.algorithms.plugins():
        if plugin.distribution != "innerloop":
            continue
        has_engine = any(option.name == "engine" for option in options_of(innerloop.get(plugin.name)))
        for engine in ("native", "torch") if has_engine else ("",):
            options = {**OPTIONS.get(plugin.name, {}), **({"engine": engine} if engine else {})}
            try:
                found = {count: [trained(plugin.name, options, count) for _ in range(runs)] for count in threads}
            except ValueError as error:
                if engine != "native":
                    raise
                rows.append((plugin.name, f"native: {str(error)[:60]}…", ["–"] * (len(threads) + 1)))
                continue
            same = [all(torch.equal(one, group[0]) for one in group) for group in found.values()]
            across = all(torch.equal(group[0], found[threads[0]][0]) for group in found.values())
            rows.append((plugin.name, engine or "–", ["yes" if each else "no" for each in (*same, across)]))
            if not all(same):
                failures.append(f"{plugin.name} {engine}: runs differ")
            if engine == "native" and not across and plugin.name not in PARTLY_TORCH:
                failures.append(f"{plugin.name} native: the number of threads matters")
    return rows, failures


def python_threads(count: int, calls: int) -> list[str]:
    """That many Python threads at once, each with models of its own: every call gives the bits of one thread alone."""
    models = {
        "mlp": (nn.Sequential(nn.Linear(20, 16), nn.Tanh(), nn.Linear(16, 5)), (20,)),
        "conv": (
            nn.Sequential(
                *(nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2)),
                *(nn.Flatten(), nn.Linear(8 * 49, 5)),
            ),
            (1, 14, 14),
        ),
    }
    labels = torch.arange(10).remainder(5).repeat(4, 1)

    def gradients(name: str, seed: int) -> list[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        original, shape = models[name]
        model = copy.deepcopy(original)
        x, query = (torch.randn(4, 10, *shape, generator=generator) for _ in range(2))
        tasks = TaskBatch(x, labels, query, labels)
        loss = innerloop.maml_loss(model, tasks, inner_lr=0.1, inner_steps=3, engine="native")
        loss.backward()
        return [loss.detach(), *(parameter.grad for parameter in model.parameters() if parameter.grad is not None)]

    cases = [(name, seed) for name in models for seed in range(4)]
    alone = {case: gradients(*case) for case in cases}
    failures: list[str] = []

    def work(number: int) -> None:
        for call in range(calls):
            case = cases[(number + call) % len(cases)]
            try:
                if not all(torch.equal(a, b) for a, b in zip(gradients(*case), alone[case], strict=True)):
                    failures.append(f"thread {number}, call {call}: other bits than alone")
            except Exception as error:
                failures.append(f"thread {number}, call {call}: {error}")

    workers = [threading.Thread(target=work, args=(number,)) for number in range(count)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return failures
