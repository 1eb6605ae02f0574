"""How long training takes to a test accuracy: innerloop, learn2learn and plain torch from the same initial model.

    benchmarks/peers.sh learn2learn
    .cache/peers/learn2learn/bin/python benchmarks/time_to_accuracy.py     into benchmarks/results/time-to-accuracy.json
    .venv/bin/python benchmarks/report.py                                  docs/time-to-accuracy.md from it

MAML and a Prototypical Network on the built-in letters, 5-way 1-shot, with the settings of `innerloop train`. All draw
the same tasks by the same sampler and make the same Adam steps: what differs is who computes loss and gradient. They
take turns, a period of steps each, in one process of learn2learn's environment; 13 minutes in all. The clocks, wall and
CPU, run while tasks are drawn and steps are made; the tests between them, the same 300 tasks of the test scripts for
all, are not counted. One is done when a test reaches the accuracy.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

import innerloop
import machine
from innerloop import Algorithm, Dataset, TaskBatch, maml_loss
from innerloop.contract import embed_tasks
from innerloop.training import TrainingSettings
from rivals.importing import skip_umbrella

RESULTS = Path(__file__).parent / "results" / "time-to-accuracy.json"
EPISODES = 300
INNER_LR = 0.4

#: The mean loss of a batch of tasks with gradients left in the model's parameters.
Step = Callable[[TaskBatch], Tensor]


@dataclass(frozen=True)
class Job:
    """A training.

    Attributes:
        goal: the test accuracy in per cent. settings: of the tasks, of Adam and of clipping.
        period: steps between tests. steps: where it ends without the goal.
        methods: by name, what makes a Step of the model.
    """

    title: str
    goal: float
    algorithm: Callable[[nn.Module], Algorithm]
    model: Callable[[], nn.Module]
    settings: TrainingSettings
    period: int
    steps: int
    methods: dict[str, Callable[[nn.Module], Step]]


@dataclass
class Training:
    """One method's, as far as it has come: points are (steps, wall seconds, CPU seconds, test accuracy in per cent)."""

    job: Job
    model: nn.Module
    step: Step
    seed: int
    done: int = 0
    wall: float = 0.0
    cpu: float = 0.0
    points: list[tuple[int, float, float, float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=self.job.settings.lr)

    @property
    def ended(self) -> bool:
        return self.done >= self.job.steps or (bool(self.points) and self.points[-1][3] >= self.job.goal)

    def go_on(self, tasks: Dataset) -> None:
        """One period of steps."""
        sizes = self.job.settings
        wall, cpu = time.perf_counter(), time.process_time()
        for number in range(self.done, self.done + self.job.period):
            batch = tasks.sample(
                sizes.meta_batch_size, sizes.ways, sizes.shots, sizes.queries, self.seed,
                first_task=number * sizes.meta_batch_size,
            )  # fmt: skip
            self.optimizer.zero_grad()
            self.step(batch)
            if sizes.clip:
                nn.utils.clip_grad_norm_(self.model.parameters(), sizes.clip)
            self.optimizer.step()
        self.wall += time.perf_counter() - wall
        self.cpu += time.process_time() - cpu
        self.done += self.job.period

    def test(self, tasks: Dataset) -> None:
        algorithm = self.job.algorithm(self.model)
        record = innerloop.evaluate(algorithm, tasks, ways=5, shots=1, episodes=EPISODES)
        algorithm.train()
        self.points.append((self.done, self.wall, self.cpu, 100 * record.mean))


# --- MAML ---------------------------------------------------------------------------------------


def maml_by_innerloop(model: nn.Module) -> Step:
    def step(batch: TaskBatch) -> Tensor:
        loss = maml_loss(model, batch, inner_lr=INNER_LR)
        loss.backward()
        return loss

    return step


def maml_by_learn2learn(model: nn.Module) -> Step:
    skip_umbrella("learn2learn", "learn2learn.algorithms")
    from learn2learn.algorithms.maml import MAML

    maml = MAML(model, lr=INNER_LR)

    def task_loss(support_x: Tensor, support_y: Tensor, query_x: Tensor, query_y: Tensor) -> Tensor:
        learner = maml.clone()
        learner.adapt(F.cross_entropy(learner(support_x), support_y))
        return F.cross_entropy(learner(query_x), query_y)

    return one_by_one(task_loss)


def maml_by_torch(model: nn.Module) -> Step:
    def task_loss(support_x: Tensor, support_y: Tensor, query_x: Tensor, query_y: Tensor) -> Tensor:
        initial = dict(model.named_parameters())
        loss = F.cross_entropy(model(support_x), support_y)
        gradients = torch.autograd.grad(loss, tuple(initial.values()), create_graph=True)
        adapted = {
            name: value - INNER_LR * gradient
            for (name, value), gradient in zip(initial.items(), gradients, strict=True)
        }
        return F.cross_entropy(functional_call(model, adapted, (query_x,)), query_y)

    return one_by_one(task_loss)


def one_by_one(task_loss: Callable[..., Tensor]) -> Step:
    """A graph for each task, freed before the next."""

    def step(batch: TaskBatch) -> Tensor:
        total = torch.zeros(())
        for task in zip(batch.support_x, batch.support_y, batch.query_x, batch.query_y, strict=True):
            loss = task_loss(*task) / batch.num_tasks
            loss.backward()
            total += loss.detach()
        return total

    return step


# --- Prototypical Networks ----------------------------------------------------------------------


def protonet_by_innerloop(model: nn.Module) -> Step:
    algorithm = innerloop.get("protonet")(model)

    def step(batch: TaskBatch) -> Tensor:
        loss = algorithm(batch).loss
        loss.backward()
        return loss

    return step


def protonet_by_learn2learn(model: nn.Module) -> Step:
    skip_umbrella("learn2learn", "learn2learn.nn")
    from learn2learn.nn.protonet import PrototypicalClassifier

    def logits(support: Tensor, labels: Tensor, queries: Tensor, _: int) -> Tensor:
        return PrototypicalClassifier(support, labels)(queries)

    return embedded(model, logits)


def protonet_by_torch(model: nn.Module) -> Step:
    def logits(support: Tensor, labels: Tensor, queries: Tensor, ways: int) -> Tensor:
        prototypes = torch.stack([support[labels == label].mean(0) for label in range(ways)])
        return -(queries[:, None] - prototypes).square().sum(2)  # as in the authors' code

    return embedded(model, logits)


def embedded(model: nn.Module, logits: Callable[..., Tensor]) -> Step:
    """All samples in one pass, so that BatchNorm sees the episode; then task by task."""

    def step(batch: TaskBatch) -> Tensor:
        support, queries = embed_tasks(lambda x: model(x).flatten(1), batch)
        losses = [
            F.cross_entropy(logits(*task, batch.ways), query_y)
            for *task, query_y in zip(support, batch.support_y, queries, batch.query_y, strict=True)
        ]
        loss = torch.stack(losses).mean()
        loss.backward()
        return loss

    return step


# --- the command --------------------------------------------------------------------------------


def _settings(algorithm: str) -> TrainingSettings:
    return TrainingSettings(**innerloop.get(algorithm).training_defaults)


def _conv4(**options: Any) -> Callable[[], nn.Module]:
    return lambda: innerloop.models.build("conv4")((1, 28, 28), **options)


JOBS = {
    "maml": Job(
        "MAML, 5-way 1-shot, Conv4-32 with stride 2, second order, K = 1, 8 tasks a step",
        90.0,
        lambda model: innerloop.get("maml")(model, inner_lr=INNER_LR),
        _conv4(outputs=5, filters=32, downsample="stride"),
        _settings("maml"),
        100,
        3000,
        {"innerloop": maml_by_innerloop, "learn2learn": maml_by_learn2learn, "torch": maml_by_torch},
    ),
    "protonet": Job(
        "Prototypical Network, trained 20-way 1-shot, Conv4-64, one task a step",
        95.0,
        lambda model: innerloop.get("protonet")(model),
        _conv4(outputs=None),
        _settings("protonet"),
        50,
        600,
        {"innerloop": protonet_by_innerloop, "learn2learn": protonet_by_learn2learn, "torch": protonet_by_torch},
    ),
}


def train(job: Job, seed: int, limit: int | None) -> dict[str, Any]:
    """Every method's points, by name."""
    data = innerloop.data.get("glyphs")
    tasks, tests = data.split("train"), data.split("test")
    trainings: dict[str, Training] = {}
    for name, method in job.methods.items():
        torch.manual_seed(seed)
        model = job.model()
        trainings[name] = Training(job, model, method(model), seed)
    while any(not training.ended for training in trainings.values()):
        for name, training in trainings.items():
            if not training.ended:
                training.go_on(tasks)
                training.test(tests)
                steps, wall, _, accuracy = training.points[-1]
                print(
                    f"{job.title}: seed {seed}, {name}: {accuracy:.2f} % after {steps} steps, {wall:.1f} s", flush=True
                )
        if limit is not None and min(training.done for training in trainings.values()) >= limit:
            break
    return {name: training.points for name, training in trainings.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", nargs="+", default=list(JOBS), choices=list(JOBS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--limit", type=int, help="steps, to try whether everything runs")
    parser.add_argument("--output", type=Path, default=RESULTS, help="JSON to write; other seeds stay in it")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    results: dict[str, Any] = {"jobs": {}}
    if arguments.output.exists():
        results = json.loads(arguments.output.read_text())
    results["machine"] = machine.describe()
    for name in arguments.jobs:
        job = JOBS[name]
        kept = results["jobs"].get(name, {}).get("seeds", {})
        results["jobs"][name] = {"title": job.title, "goal": job.goal, "seeds": kept}
        for seed in arguments.seeds:
            points = train(job, seed, arguments.limit)
            run = {**machine.this_run(), "threads": arguments.threads}
            kept[str(seed)] = {**run, "points": points}
            arguments.output.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
