"""MAML and its relatives at equal budget: three trainings of each, 5-way 1-shot on the built-in data.

    .venv/bin/python benchmarks/gradient_family.py             into benchmarks/results/gradient_family.json
    .venv/bin/python benchmarks/gradient_family.py --report    docs/gradient-family.md from it

The budget, the backbone and the choice of checkpoint are those of accuracy.py. A seed names a training: its initial
parameters and its tasks; all are tested on the same tasks. At the end the training steps of all rows are timed in
turns, which needs an idle machine.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import as_completed
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

import machine
from accuracy import BACKBONE, VALIDATIONS, Entry, command, configuration, evaluated, pool
from accuracy_report import table
from innerloop.checkpoint import load_checkpoint
from innerloop.native_engine import why_not_native
from innerloop.runs import RunConfig
from innerloop.training import BEST, fit

RESULTS = Path(__file__).parent / "results" / "gradient_family.json"
DOCUMENT = Path(__file__).parent.parent / "docs" / "gradient-family.md"
WAYS, SHOTS = 5, 1
SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class Row:
    """An algorithm by name with its options, and training settings that are not its own."""

    title: str
    algorithm: str
    options: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)


THREE_STEPS = {"inner_steps": 3, "inner_lr": 0.1}

# MAML++ is MAML with three steps and more. What each of its parts does, the rows after it say: they lack one.
ROWS = [
    Row("maml_pp", "maml_pp"),
    Row("maml_pp, BatchNorm as MAML's", "maml_pp", {"bn": "transductive"}),
    Row("maml_pp, BatchNorm as MAML's, constant schedule", "maml_pp", {"bn": "transductive"}, {"schedule": "constant"}),
    Row("maml, three steps", "maml", THREE_STEPS),
    Row("meta_sgd, three steps", "meta_sgd", THREE_STEPS),
    Row("anil, three steps", "anil", THREE_STEPS),
    Row("maml", "maml"),
    Row("meta_sgd", "meta_sgd"),
    Row("anil", "anil"),
]


def settled(row: Row, seed: int, images: int) -> RunConfig:
    config = configuration(Entry(row.title, row.algorithm, row.options), WAYS, images)
    return replace(config, training=replace(config.training, seed=seed, **row.settings))


def train(number: int, seed: int, images: int, episodes: int) -> dict[str, Any]:
    """A training and its test. In a process of its own, with one thread."""
    torch.set_num_threads(1)
    config = settled(ROWS[number], seed, images)
    dataset = config.dataset()
    algorithm = config.build(dataset)
    start = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        fit(
            algorithm,
            dataset.split("train"),
            settings=config.training,
            validation=dataset.split("val"),
            validation_ways=WAYS,
            run=folder,
        )
        load_checkpoint(Path(folder) / BEST, algorithm)
    seconds = time.process_time() - start
    return {
        **evaluated(algorithm, dataset.split("test"), WAYS, SHOTS, episodes),
        "seed": seed,  # of the training; the test tasks are always those of seed 0
        "command": command(config),
        "seconds": round(seconds, 1),
    }


def timed(images: int, rounds: int) -> list[dict[str, Any]]:
    """The CPU time of a training step of each row, forward and backward, one thread, in turns.

    MAML++'s is one late in training: the last step's loss alone, second order.
    """
    torch.set_num_threads(1)
    built = []
    for row in ROWS:
        config = settled(row, 0, images)
        data = config.dataset()
        algorithm = config.build(data).train()
        if hasattr(algorithm, "steps_done"):
            algorithm.steps_done.fill_(algorithm.training_steps)
        built.append((config.training, data.split("train"), algorithm))
    taken: list[list[float]] = [[] for _ in ROWS]
    for number in range(rounds + 1):  # an engine's first step is slower, and not counted
        for (sizes, data, algorithm), times in zip(built, taken, strict=True):
            tasks = data.sample(
                sizes.meta_batch_size, WAYS, SHOTS, sizes.queries, 0, first_task=number * sizes.meta_batch_size
            )
            start = time.process_time()
            algorithm(tasks).loss.backward()
            times.append(1000 * (time.process_time() - start))
            algorithm.zero_grad()
    return [
        {
            "step_ms": statistics.median(times[1:]),
            "engine": "torch" if why_not_native(a.model, tasks, a.inner_loop(classification=True)) else "native",
        }
        for (_, _, a), times in zip(built, taken, strict=True)
    ]


def document(results: dict[str, Any]) -> Iterator[str]:
    facts = {**results, **results["backbone"], **results["machine"], "image_count": results["images"]}
    yield from _INTRODUCTION.format(**facts, ways=WAYS, shots=SHOTS).splitlines()
    yield ""
    head = ["", "accuracy, mean of the seeds", "lowest … highest", "of each seed", "a step, ms", "engine"]
    yield from table([*head, "a training, s"], map(accuracy_row, results["rows"]))
    yield from ("", *_READING.splitlines())
    yield from ("", "The commands of seed 0, in the order of the rows:", "")
    yield from (f"    {row['trainings'][0]['command']}" for row in results["rows"])


def accuracy_row(row: dict[str, Any]) -> list[str]:
    accuracies = [100 * training["mean"] for training in row["trainings"]]
    each = ", ".join(f"{100 * t['mean']:.1f} ± {100 * t['ci95']:.1f}" for t in row["trainings"])
    spread = f"{min(accuracies):.1f} … {max(accuracies):.1f}"
    seconds = statistics.mean(training["seconds"] for training in row["trainings"])
    mean = f"{statistics.mean(accuracies):.1f}"
    return [row["title"], mean, spread, each, f"{row['step_ms']:.1f}", row["engine"], f"{seconds:.0f}"]


_INTRODUCTION = """\
# MAML and its relatives at equal budget

<!-- Written by benchmarks/gradient_family.py from benchmarks/results/gradient_family.json: change those, not this. -->

Test accuracy in %, {ways}-way {shots}-shot on the built-in glyphs, scripts never trained on. Conv4 of {filters} filters
that halves by a stride of 2; {images:,} training images, support and query sets together; Adam at 1e-3; the checkpoint
that was best in {validations} validations; {episodes} test tasks of 15 queries a class, the same for every training.
Three trainings of each, of other initial parameters and other tasks; ± is the 95% interval over the test tasks of one.
BatchNorm is transductive, MAML++'s with a γ and a β for each inner step where the row does not say otherwise.

A step is a training step of 8 tasks, forward and backward: the median of {rounds} in turns, CPU time of one thread
({processor}); MAML++'s one late in training. A training is CPU time with its validations.

    .venv/bin/python benchmarks/gradient_family.py --images {image_count}
    .venv/bin/python benchmarks/gradient_family.py --report"""


_READING = """\
What the rows say, of these trainings and this budget:

- MAML++ is worse than MAML with the same three steps, and it is the cosine schedule that makes it so: with a constant
  learning rate it is level. The schedule halves the mean learning rate, which so short a training cannot spare.
  Per-step BatchNorm makes no difference that the spread would show, and runs on the torch engine.
- Three small steps are better than one large step, for MAML and Meta-SGD by far more than the seeds differ.
- Meta-SGD is level with MAML.
- ANIL's one step is better than MAML's and takes less time; with three steps they differ by less."""


def main() -> None:
    arguments = _parse()
    if arguments.report:
        arguments.document.write_text("\n".join(document(json.loads(arguments.output.read_text()))) + "\n")
        return
    start = time.perf_counter()
    trainings: list[list[dict[str, Any]]] = [[] for _ in ROWS]
    with pool(arguments.jobs) as workers:
        waiting = {
            workers.submit(train, number, seed, arguments.images, arguments.episodes): number
            for number in range(len(ROWS))
            for seed in SEEDS
        }
        for done in as_completed(waiting):
            title, training = ROWS[waiting[done]].title, done.result()
            trainings[waiting[done]].append(training)
            words = f"seed {training['seed']}: {100 * training['mean']:.1f} ± {100 * training['ci95']:.1f}"
            print(f"[{time.perf_counter() - start:5.0f} s] {title}, {words} in {training['seconds']} s", flush=True)
    steps = timed(arguments.images, arguments.rounds)
    results = {
        "machine": machine.describe(),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "images": arguments.images,
        "episodes": arguments.episodes,
        "rounds": arguments.rounds,
        "backbone": BACKBONE,
        "validations": VALIDATIONS,
        "rows": [
            {"title": row.title, **step, "trainings": sorted(found, key=lambda training: training["seed"])}
            for row, step, found in zip(ROWS, steps, trainings, strict=True)
        ],
    }
    for row in results["rows"]:
        print(" | ".join(accuracy_row(row)))
    arguments.output.parent.mkdir(exist_ok=True)
    arguments.output.write_text(json.dumps(results, indent=1) + "\n")


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=200_000, help="training images of a training")
    parser.add_argument("--episodes", type=int, default=600, help="test tasks of a training")
    parser.add_argument("--rounds", type=int, default=30, help="steps of each row that are timed")
    parser.add_argument("--jobs", type=int, default=2, help="trainings at a time, one thread each")
    parser.add_argument("--report", action="store_true", help="write the document from the output of an earlier run")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--document", type=Path, default=DOCUMENT)
    return parser.parse_args()


if __name__ == "__main__":
    main()
