"""The figure of Andrychowicz et al. 2016 for innerloop's learned optimizer: loss against optimization step.

    .venv/bin/python benchmarks/learned_optimizer.py train      the learned optimizers, into runs/learned-optimizer
    .venv/bin/python benchmarks/learned_optimizer.py rivals     the others, into benchmarks/results/
    .venv/bin/python benchmarks/learned_optimizer.py learned    the learned ones, into the same file
    .venv/bin/python benchmarks/learned_optimizer.py speed      a training step beside plain torch's, too
    .venv/bin/python benchmarks/learned_optimizer_report.py     docs/learned-optimizer.md and its picture from it

Optimizees are random quadratics, and on minibatches of glyphs nets with one hidden layer of 20 sigmoid units and small
convolutional nets. Each rival's learning rate is the best of a grid on training tasks; all then start from the same
parameters on the same unseen tasks, and run for the horizon that the LSTM was trained for, and for as long again. One
thread.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import multiprocessing
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

import innerloop
import machine
from innerloop import Dataset, TaskBatch, reference
from innerloop.algorithms.learned_optimizer import LearnedOptimizer
from innerloop.checkpoint import load_checkpoint
from innerloop.contract import Split
from innerloop.optimizees import Optimizees, by_name, drawn_parameters
from innerloop.training import LATEST, TrainingSettings, fit

HERE = Path(__file__).parent
RUNS = HERE.parent / "runs" / "learned-optimizer"
RESULTS = HERE / "results" / "learned-optimizer.json"
HORIZON = 100
TUNING_TASKS = 20


@dataclass(frozen=True)
class Problem:
    """A distribution of optimizees and how the LSTM is trained on it.

    Attributes:
        data, model, options: by name, and the model's options. outputs: of the model. shape: of a sample.
        training: of the LSTM; its ways, shots and queries are those of all tasks.
        batch_size: of the minibatches that all optimizers see; 0: they see all of a task at each step.
        test_tasks: unseen tasks that they are compared on.
    """

    title: str
    data: str
    model: str
    shape: tuple[int, ...]
    outputs: int
    options: dict[str, Any]
    training: TrainingSettings
    batch_size: int = 0
    test_tasks: int = 100

    def algorithm(self) -> LearnedOptimizer:
        torch.manual_seed(0)
        model = innerloop.models.build(self.model)(self.shape, self.outputs, **self.options)
        return LearnedOptimizer(model, inner_steps=HORIZON, batch_size=self.batch_size)

    def part(self, split: Split) -> Dataset:
        return innerloop.data.get(self.data).split(split)

    def tasks(self, split: Split, count: int, seed: int) -> TaskBatch:
        s = self.training
        return self.part(split).sample(count, s.ways, s.shots, s.queries, seed)


PROBLEMS = {
    "quadratic": Problem(
        "Random quadratics in 10 dimensions", "quadratic", "linear", (10,), 1, {},
        TrainingSettings(steps=1500, meta_batch_size=64, ways=1, queries=1, lr=5e-3, schedule="cosine", clip=1.0,
                         validate_every=100, threads=1),
    ),
    "glyphs": Problem(
        "Glyphs, 10-way 10-shot: MLP 784-20-10, sigmoid", "glyphs", "mlp", (1, 28, 28), 10,
        {"hidden": 20, "activation": "sigmoid"},
        TrainingSettings(steps=300, meta_batch_size=1, ways=10, shots=10, queries=5, lr=5e-3, schedule="cosine",
                         clip=1.0, validate_every=20, threads=1),
        batch_size=32,
    ),
    "convnet": Problem(
        "Glyphs, 10-way 10-shot: Conv4 of 8 filters", "glyphs", "conv4", (1, 28, 28), 10,
        {"filters": 8, "downsample": "stride"},
        TrainingSettings(steps=200, meta_batch_size=2, ways=10, shots=10, queries=5, lr=5e-3, schedule="cosine",
                         clip=1.0, validate_every=20, threads=1),
        batch_size=32, test_tasks=50,
    ),
}  # fmt: skip


def train(name: str) -> None:
    """Into its run folder, or on from where the run there stands."""
    problem, run = PROBLEMS[name], RUNS / name
    before = time.process_time()
    algorithm = problem.algorithm()

    def progress(done: int, result: innerloop.Result) -> None:
        if done % problem.training.validate_every == 0:
            print(f"{name} {done}: loss {float(result.loss):.4f}, {time.process_time() - before:.0f} s", flush=True)

    fit(
        algorithm,
        problem.part("train"),
        settings=problem.training,
        run=run,
        resume=(run / LATEST).exists(),
        progress=progress,
    )
    (run / "cpu_seconds.json").write_text(json.dumps(time.process_time() - before) + "\n")


# --- the rivals ---------------------------------------------------------------------------------


class Recorded(Optimizees):
    """Optimizees that note, each time that losses are asked for, those of all of a task's samples.

    Attributes:
        history: [T] of each time.
    """

    def __init__(self, model: nn.Module, tasks: TaskBatch, batch_size: int, seed: int = 0) -> None:
        super().__init__(model, tasks, batch_size=batch_size, seed=seed)
        x, y = tasks.support_x, tasks.support_y
        self.whole = Optimizees(model, TaskBatch(x, y, x, y))
        self.history: list[Tensor] = []

    def losses_and_gradients(self, parameters: Tensor) -> tuple[Tensor, Tensor]:
        losses, gradients = super().losses_and_gradients(parameters)
        self.history.append(self.whole.query_result(parameters).task_losses if self.batch_size else losses)
        return losses, gradients

    def recorded(self) -> Tensor:
        """[times, T]."""
        return torch.stack(self.history)


Step = Callable[[int, Tensor, Tensor], Tensor]


def sgd(rate: float) -> Step:
    return lambda k, theta, gradient: theta - rate * gradient


def rmsprop(rate: float) -> Step:
    """torch.optim.RMSprop's defaults, for all tasks at once."""
    square: Any = 0.0

    def step(k: int, theta: Tensor, gradient: Tensor) -> Tensor:
        nonlocal square
        square = 0.99 * square + 0.01 * gradient**2
        return theta - rate * gradient / (square.sqrt() + 1e-8)

    return step


def adam(rate: float) -> Step:
    """torch.optim.Adam's defaults, for all tasks at once."""
    mean: Any = 0.0
    square: Any = 0.0

    def step(k: int, theta: Tensor, gradient: Tensor) -> Tensor:
        nonlocal mean, square
        mean = 0.9 * mean + 0.1 * gradient
        square = 0.999 * square + 0.001 * gradient**2
        return theta - rate * (mean / (1 - 0.9 ** (k + 1))) / ((square / (1 - 0.999 ** (k + 1))).sqrt() + 1e-8)

    return step


FIRST_ORDER = {"SGD": sgd, "RMSprop": rmsprop, "Adam": adam}


def descend(optimizees: Recorded, theta: Tensor, step: Step, steps: int) -> Tensor:
    """Losses before the first step and after each, [steps + 1, T]."""
    for k in range(steps + 1):
        _, gradient = optimizees.losses_and_gradients(theta)
        theta = step(k, theta, gradient)
    return optimizees.recorded()


def lbfgs(model: nn.Module, tasks: TaskBatch, batch_size: int, theta: Tensor, rate: float, steps: int) -> Tensor:
    """torch.optim.LBFGS without a line search, one step and so one gradient at a time; [steps + 1, T]."""
    columns = []
    for index, task in enumerate(tasks):
        optimizees = Recorded(model, task, batch_size, seed=index)
        parameter = theta[index : index + 1].clone().requires_grad_()
        optimizer = torch.optim.LBFGS([parameter], lr=rate, max_iter=1, history_size=10)

        def closure(o: Recorded = optimizees, p: Tensor = parameter) -> Tensor:
            losses, p.grad = o.losses_and_gradients(p.detach())
            return losses[0]

        for _ in range(steps + 1):
            optimizer.step(closure)
        columns.append(optimizees.recorded()[: steps + 1])
    return torch.cat(columns, 1)


RATES = [10 ** (exponent / 3) for exponent in range(-9, 4)]  # 0.001 … 10, three a decade
SGD_RATES = [10 ** (exponent / 3) for exponent in range(-9, 7)]  # … 100
LBFGS_RATES = [0.03, 0.1, 0.3, 1.0]


def objective(losses: Tensor) -> float:
    """What a learning rate is chosen by: the median loss at the horizon, infinite where a task's is not a number."""
    return float(finite(losses[HORIZON]).median())


def unseen(problem: Problem, model: nn.Module) -> tuple[TaskBatch, Tensor]:
    """The tasks that all optimizers are compared on, and what they start from."""
    torch.manual_seed(1)
    return problem.tasks("test", problem.test_tasks, seed=0), drawn_parameters(model, problem.test_tasks)


def compare_rivals(name: str, titles: Sequence[str]) -> dict[str, Any]:
    """A row for each: its learning rate and what it reaches on the unseen tasks."""
    problem = PROBLEMS[name]
    model = problem.algorithm().model
    test, theta = unseen(problem, model)
    tuning = problem.tasks("train", TUNING_TASKS, seed=1)
    tuning_theta = drawn_parameters(model, TUNING_TASKS)
    size = problem.batch_size
    runs: dict[str, tuple[list[float], Callable[[TaskBatch, Tensor, float, int], Tensor]]] = {
        title: (SGD_RATES if title == "SGD" else RATES, lambda batch, start, rate, steps, make=make: descend(
            Recorded(model, batch, size), start, make(rate), steps
        ))
        for title, make in FIRST_ORDER.items()
    }  # fmt: skip
    runs["L-BFGS"] = LBFGS_RATES, lambda batch, start, rate, steps: lbfgs(model, batch, size, start, rate, steps)
    rows = {}
    for title in titles:
        rates, run = runs[title]
        scores = {rate: objective(run(tuning, tuning_theta, rate, HORIZON)) for rate in rates}
        best = min(scores, key=lambda rate: scores[rate])
        rows[title] = {
            "rate": best,
            "rates": rates,
            "tuning_medians": list(scores.values()),
            **row(run(test, theta, best, 2 * HORIZON)),
        }
        print(f"{name}: {title}, learning rate {best:.3g}: {rows[title]['at']}", flush=True)
    return rows


def compare_learned(name: str, processes: int) -> dict[str, Any]:
    """What the trained LSTM reaches on the unseen tasks."""
    state = load_checkpoint(RUNS / name / LATEST, PROBLEMS[name].algorithm())
    parts = [slice(first, first + 10) for first in range(0, PROBLEMS[name].test_tasks, 10)]  # of little memory
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        losses = torch.cat(list(pool.map(learned_losses, [name] * len(parts), parts)), 1)
    found = row(losses)
    print(f"{name}: learned: {found['at']}", flush=True)
    seconds = json.loads((RUNS / name / "cpu_seconds.json").read_text())
    return {"learned": {"trained_steps": state["step"], "training_cpu_seconds": seconds, **found}}


def learned_losses(name: str, part: slice) -> Tensor:
    """Of some of the unseen tasks, [steps + 1, T]."""
    torch.set_num_threads(1)
    problem, algorithm = PROBLEMS[name], PROBLEMS[name].algorithm()
    load_checkpoint(RUNS / name / LATEST, algorithm)
    test, theta = unseen(problem, algorithm.model)
    optimizees = Recorded(algorithm.model, test[part], problem.batch_size, seed=part.start)
    algorithm.optimize(optimizees, theta[part], 2 * HORIZON)
    return optimizees.recorded()


def row(losses: Tensor) -> dict[str, Any]:
    """Of losses [steps + 1, T]: the median and the quartiles of the tasks after each step, and more at the horizons."""
    low, median, high = finite(losses).quantile(torch.tensor([0.25, 0.5, 0.75]).double(), 1)
    at = {str(step): at_step(losses[step]) for step in (HORIZON, 2 * HORIZON)}
    return {"at": at, "median": median.tolist(), "quartiles": [low.tolist(), high.tolist()]}


def finite(losses: Tensor) -> Tensor:
    """float64, with a loss that is not a number as infinite."""
    return losses.double().nan_to_num(nan=torch.inf)


def at_step(losses: Tensor) -> dict[str, Any]:
    """The median of the tasks' losses with its 95% interval by the bootstrap, and the quartiles."""
    values = finite(losses)
    random = torch.Generator().manual_seed(0)
    medians = values[torch.randint(len(values), (10_000, len(values)), generator=random)].median(1).values
    low, high = medians.quantile(torch.tensor([0.025, 0.975]).double()).tolist()
    quartiles = values.quantile(torch.tensor([0.25, 0.75]).double()).tolist()
    return {"median": float(values.quantile(0.5)), "interval": [low, high], "quartiles": quartiles}


# --- training speed -----------------------------------------------------------------------------


def speed(name: str, rounds: int) -> dict[str, Any]:
    """CPU time of a training step, the first segment of an optimization, beside the same in plain torch."""
    problem = PROBLEMS[name]
    algorithm = problem.algorithm().eval()
    algorithm.inner_steps = algorithm.truncation
    batch = problem.tasks("train", problem.training.meta_batch_size, seed=2)
    theta = drawn_parameters(algorithm.model, batch.num_tasks)
    check_gradients(algorithm, batch, theta)
    plain = TorchLearnedOptimizer(algorithm)

    def ours() -> list[Tensor]:
        return algorithm.optimize(algorithm.optimizees(batch), theta, algorithm.truncation, 0).gradients

    def torchs() -> list[Tensor]:
        return plain.gradients(algorithm.optimizees(batch), theta)

    seconds: dict[str, list[float]] = {"innerloop": [], "torch": []}
    for _ in range(rounds):
        for rival, step in (("innerloop", ours), ("torch", torchs)):
            before = time.thread_time()
            step()
            seconds[rival].append(time.thread_time() - before)
    ratios = [b / a for a, b in zip(seconds["innerloop"], seconds["torch"], strict=True)]
    medians = {rival: 1e3 * statistics.median(values) for rival, values in seconds.items()}
    coordinates = theta.numel()
    print(f"{name}: {medians} ms, ratio {statistics.median(ratios):.2f}", flush=True)
    return {
        "coordinates": coordinates,
        "steps": algorithm.truncation,
        "rounds": rounds,
        "milliseconds": medians,
        "ratio": {"min": min(ratios), "median": statistics.median(ratios), "max": max(ratios)},
    }


def check_gradients(learned: LearnedOptimizer, batch: TaskBatch, theta: Tensor) -> None:
    """Both compute the same in float64."""
    twin, exact = copy.deepcopy(learned).double(), batch.to(torch.float64)
    ours = twin.optimize(twin.optimizees(exact), theta.double(), twin.truncation, 0).gradients
    torchs = TorchLearnedOptimizer(twin).gradients(twin.optimizees(exact), theta.double())
    for actual, expected in zip(ours, torchs, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-8 * float(expected.abs().max()))


class TorchLearnedOptimizer:
    """The same training step as one writes it in torch: nn.LSTMCell on [coordinates, …], the layers of a model of
    Linear layers as batched products over the tasks, any other by functional_call, and one graph of the unrolled
    optimization with the gradients given to the cells detached."""

    def __init__(self, learned: LearnedOptimizer) -> None:
        self.learned = learned
        self.model = copy.deepcopy(learned.model).train()  # BatchNorm's statistics are the batch's
        hidden = len(learned.output) - 1
        dtype = learned.output.dtype
        self.cells = [nn.LSTMCell(2, hidden, dtype=dtype), nn.LSTMCell(hidden, hidden, dtype=dtype)]
        self.head = nn.Linear(hidden, 1, dtype=dtype)
        with torch.no_grad():
            for cell, weights in zip(self.cells, (learned.first, learned.second), strict=True):
                inputs = cell.input_size
                cell.weight_ih.copy_(weights[:, :inputs])
                cell.weight_hh.copy_(weights[:, inputs:-1])
                cell.bias_ih.copy_(weights[:, -1])
                cell.bias_hh.zero_()
            self.head.weight.copy_(learned.output[None, :-1])
            self.head.bias.copy_(learned.output[-1:])

    def losses(self, parameters: Tensor, batch: TaskBatch) -> Tensor:
        """[T], of query sets."""
        named = by_name(self.model, parameters)
        parts = list(named.values())
        x = batch.query_x.flatten(2)
        if len(parts) == 1:
            return (x @ parts[0].mT - batch.query_y).square().mean((1, 2))
        if len(parts) == 4:
            h = torch.baddbmm(parts[1][:, None], x, parts[0].mT).sigmoid()
            logits = torch.baddbmm(parts[3][:, None], h, parts[2].mT)
        else:
            each = [{name: value[task] for name, value in named.items()} for task in range(batch.num_tasks)]
            outputs = zip(each, batch.query_x, strict=True)
            logits = torch.stack([functional_call(self.model, own, (images,)) for own, images in outputs])
        losses = F.cross_entropy(logits.flatten(0, 1), batch.query_y.flatten(), reduction="none")
        return losses.view(len(logits), -1).mean(1)

    def gradients(self, optimizees: Optimizees, theta: Tensor) -> list[Tensor]:
        """Of φ in the learned optimizer's form."""
        learned, count = self.learned, theta.numel()
        h1 = c1 = h2 = c2 = theta.new_zeros(count, len(learned.output) - 1)
        theta = theta.clone().requires_grad_()
        losses = self.losses(theta, optimizees.samples())
        total = 0.0
        for _ in range(learned.truncation):
            # The graph stays: the loss is part of the meta-loss, too.
            (gradient,) = torch.autograd.grad(losses.sum(), theta, retain_graph=True)
            x = reference.log_and_sign(gradient.detach().flatten(), learned.p).mT
            h1, c1 = self.cells[0](x, (h1, c1))
            h2, c2 = self.cells[1](h1, (h2, c2))
            theta = theta + learned.scale * self.head(h2).view_as(theta)
            losses = self.losses(theta, optimizees.samples())
            total = total + losses.mean()
        weights = [
            *(weight for cell in self.cells for weight in (cell.weight_ih, cell.weight_hh, cell.bias_ih)),
            *(self.head.weight, self.head.bias),
        ]
        g = torch.autograd.grad(total / learned.truncation, weights)
        layers = [torch.cat((g[i], g[i + 1], g[i + 2][:, None]), 1) for i in (0, 3)]
        return [*layers, torch.cat((g[6][0], g[7]))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("train", "rivals", "learned", "speed"))
    parser.add_argument("--problems", nargs="+", default=list(PROBLEMS), choices=list(PROBLEMS), metavar="NAME")
    rivals = [*FIRST_ORDER, "L-BFGS"]
    parser.add_argument("--optimizers", nargs="+", default=rivals, choices=rivals, metavar="NAME")
    parser.add_argument("--processes", type=int, default=1, help="that share the learned optimizer's unseen tasks")
    parser.add_argument("--rounds", type=int, default=9, help="of the measurement of speed")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for name in arguments.problems:
        if arguments.what == "train":
            train(name)
            continue
        problem = PROBLEMS[name]
        if arguments.what == "speed":
            found = {"speed": speed(name, arguments.rounds)}
        else:
            learned = arguments.what == "learned"
            rows = compare_learned(name, arguments.processes) if learned else compare_rivals(name, arguments.optimizers)
            found = {"optimizers": rows}
        results: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"problems": {}}
        entry = results["problems"].setdefault(name, {"optimizers": {}})
        entry["title"], entry["machine"] = problem.title, machine.describe()
        entry["date"] = datetime.now(timezone.utc).date().isoformat()
        entry["training"] = asdict(problem.training)
        entry["tasks"], entry["tuning_tasks"], entry["horizon"] = problem.test_tasks, TUNING_TASKS, HORIZON
        entry["optimizers"] |= found.pop("optimizers", {})
        entry |= found
        RESULTS.write_text(json.dumps(rounded(results), indent=1) + "\n")


def rounded(value: Any) -> Any:
    """Five digits of every number; what is infinite as null."""
    if isinstance(value, dict):
        return {key: rounded(part) for key, part in value.items()}
    if isinstance(value, list):
        return [rounded(part) for part in value]
    if isinstance(value, float):
        return float(f"{value:.5g}") if math.isfinite(value) else None
    return value


if __name__ == "__main__":
    main()
