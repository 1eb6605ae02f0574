"""Trains every few-shot classifier on the built-in data with one backbone and one budget, and tests them alike.

    .venv/bin/python benchmarks/accuracy.py               everything, into benchmarks/results/accuracy.json
    .venv/bin/python benchmarks/accuracy_report.py        docs/algorithms.md from it

The budget is the number of training images, those of support and query sets together. Methods that take any number of
classes are trained once; those with a head of fixed ways once for each number of ways. Each is tested by the checkpoint
that was best in validation, on the same 600 tasks a setting. What is done here is what `innerloop train` and `innerloop
evaluate` do; the results hold the command of every row. --runs keeps the run folders, and goes on with them.
"""

from __future__ import annotations

import argparse
import copy
import json
import multiprocessing
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch import nn

import innerloop
import machine
from innerloop import Algorithm, Dataset, TaskBatch
from innerloop.checkpoint import load_checkpoint
from innerloop.data.class_dataset import ClassDataset
from innerloop.evaluation import embed
from innerloop.options import options_of
from innerloop.registry import algorithms
from innerloop.runs import Choice, RunConfig
from innerloop.training import BEST, TrainingSettings, fit

RESULTS = Path(__file__).parent / "results" / "accuracy.json"
SETTINGS = [(5, 1), (5, 5), (20, 1), (20, 5)]  # ways, shots
BACKBONE = {"filters": 32, "downsample": "stride"}
VALIDATIONS = 4
VALIDATION_TASKS = 100


@dataclass(frozen=True)
class Entry:
    """A training, and what is evaluated of it.

    Attributes:
        title: of its row. algorithm: by name. options: its own.
        ways: of a head, one training each; empty: it has none.
        variants: title → attributes of the trained algorithm to change for further rows.
        shuffled: train on support sets in random order, where the data set's are class by class.
        orders: evaluate with support sets in either order.
        budget: its share of the training images.
    """

    title: str
    algorithm: str
    options: dict[str, Any] = field(default_factory=dict)
    ways: tuple[int, ...] = ()
    variants: dict[str, dict[str, Any]] = field(default_factory=dict)
    shuffled: bool = False
    orders: bool = False
    budget: float = 1.0


CONTEXT = {"full_context": True}

# The longest first, so that the last to end is a short one.
ENTRIES = [
    Entry("relation_net", "relation_net"),
    Entry("matching_net, full context, trained on shuffled support sets", "matching_net", CONTEXT, shuffled=True,
          orders=True),
    Entry("matching_net, full context", "matching_net", CONTEXT, orders=True),
    Entry("matching_net", "matching_net", orders=True),
    Entry("protonet", "protonet"),
    Entry("protonet, cosine", "protonet", {"metric": "cosine", "temperature": 0.1}),
    Entry("metaoptnet, SVM", "metaoptnet"),
    Entry("metaoptnet, ridge regression", "metaoptnet", {"head": "ridge"}),
    Entry("r2d2", "r2d2"),
    Entry("baseline", "baseline"),
    Entry("baseline_pp", "baseline_pp"),
    Entry("finetune", "finetune", variants={"finetune, transductive": {"bn": "transductive"}}),
    Entry("simpleshot", "simpleshot", variants={"simpleshot, untransformed: nearest mean": {"transform": "un"}}),
    Entry("maml_pp", "maml_pp", ways=(5, 20)),
    Entry("maml", "maml", ways=(5, 20)),
    Entry("anil", "anil", ways=(5, 20)),
    Entry("imaml", "imaml", ways=(5, 20)),
    Entry("fomaml", "fomaml", ways=(5, 20)),
    Entry("boil", "boil", ways=(5, 20)),
    Entry("meta_sgd", "meta_sgd", ways=(5, 20)),
    Entry("proto_maml", "proto_maml", ways=(5, 20)),
    Entry("reptile", "reptile", ways=(5, 20)),
    Entry("finetune, no pre-training", "finetune", {"pretraining": "none", "inner_lr": 0.2, "inner_steps": 5},
          budget=0.0, variants={"finetune, no pre-training, transductive": {"bn": "transductive"}}),
]  # fmt: skip

#: Tasks of a batch where a head of 20 ways makes each of them four times as large.
TASKS_OF_20_WAYS = 4


class Shuffled(Dataset):
    """A data set's tasks with their support sets in random order, the same for the same task."""

    def __init__(self, source: ClassDataset) -> None:
        self.source = source
        self.input_shape = source.input_shape

    def split(self, name: Any) -> Shuffled:
        return Shuffled(self.source.split(name))

    def sample(self, tasks: int, ways: int, shots: int, queries: int, seed: int, first_task: int = 0) -> TaskBatch:
        drawn = self.source.sample(tasks, ways, shots, queries, seed, first_task)
        orders = [
            torch.randperm(ways * shots, generator=torch.Generator().manual_seed(first_task + task))
            for task in range(tasks)
        ]
        order = torch.stack(orders)
        x = torch.stack([x[chosen] for x, chosen in zip(drawn.support_x, order, strict=True)])
        return TaskBatch(x, drawn.support_y.gather(1, order), drawn.query_x, drawn.query_y)


def configuration(entry: Entry, ways: int | None, images: int) -> RunConfig:
    cls = algorithms.get(entry.algorithm)
    settings = dict(cls.training_defaults)
    if ways is not None:
        settings["ways"] = ways
        if ways == 20:
            settings["meta_batch_size"] = TASKS_OF_20_WAYS
    sizes = TrainingSettings(**settings)
    per_step = sizes.meta_batch_size * sizes.ways * (sizes.shots + sizes.queries)
    settings["steps"] = steps = max(1, int(entry.budget * images) // per_step)
    settings |= {"validate_every": max(1, steps // VALIDATIONS), "validation_episodes": VALIDATION_TASKS, "threads": 1}
    halvings = {"halvings": 2} if entry.algorithm == "relation_net" else {}
    return RunConfig(
        algorithm=Choice.of(algorithms, entry.algorithm, entry.options),
        model=Choice("conv4", {**BACKBONE, **halvings}),
        data=Choice("glyphs", {}),
        training=TrainingSettings(**settings),
        evaluation_ways=ways or 5,
        episodes=600,
    )


def command(config: RunConfig) -> str:
    """The words that train the same from the command line."""
    defaults = algorithms.get(config.algorithm.name).training_defaults
    words = ["innerloop train", config.algorithm.name]
    words += [f"--model-option {name}={value}" for name, value in config.model.options.items()]
    for option in options_of(TrainingSettings):
        value = getattr(config.training, option.name)
        if value != defaults.get(option.name, option.default):
            words.append(f"--{option.name.replace('_', '-')} {value}")
    for name, value in config.algorithm.options.items():
        words.append(f"--{name.replace('_', '-')}" + ("" if value is True else f" {value}"))
    return " ".join(words)


def run_entry(title: str, ways: int | None, images: int, episodes: int, runs: str) -> list[dict[str, Any]]:
    """Train and evaluate; a row for each variant. In a process of its own, with one thread."""
    torch.set_num_threads(1)
    entry = next(entry for entry in ENTRIES if entry.title == title)
    config = configuration(entry, ways, images)
    dataset = config.dataset()
    assert isinstance(dataset, ClassDataset)
    algorithm = config.build(dataset)
    run = Path(runs) / f"{title.replace(' ', '-').replace(',', '')}-{ways or 'any'}-ways"
    start = time.process_time()
    config.save(run, algorithm)
    source: Dataset = Shuffled(dataset) if entry.shuffled else dataset
    fit(
        algorithm,
        source.split("train"),
        settings=config.training,
        validation=source.split("val"),
        validation_ways=config.evaluation_ways,
        run=run,
        resume=(run / BEST).exists(),
    )
    load_checkpoint(run / BEST, algorithm)
    trained = time.process_time() - start
    settings = [(way, shot) for way, shot in SETTINGS if ways in (None, way)]
    test = dataset.split("test")
    # Shuffled support sets are no option of the command line.
    common = {
        "command": None if entry.shuffled else command(config),
        "steps": config.training.steps,
        "seconds": round(trained, 1),
        "instruction_set": machine.instruction_set(),
    }
    rows = []
    for variant, changes in {title: {}, **entry.variants}.items():
        for name, value in changes.items():
            assert hasattr(algorithm, name)
            setattr(algorithm, name, value)
        evaluations = [evaluated(algorithm, test, way, shot, episodes) for way, shot in settings]
        row = {"title": variant, **common, "evaluations": evaluations}
        if entry.orders:
            row["shuffled"] = shuffled_evaluations(algorithm, test, settings, episodes)
        rows.append(row)
    return rows


def evaluated(algorithm: Algorithm, test: Dataset, ways: int, shots: int, episodes: int) -> dict[str, Any]:
    return innerloop.evaluate(algorithm, test, ways=ways, shots=shots, episodes=episodes, seed=0).as_dict()


def shuffled_evaluations(
    algorithm: Any, test: ClassDataset, settings: Sequence[tuple[int, int]], episodes: int
) -> list[dict[str, Any]]:
    """On the same tasks, their support sets shuffled; samples are embedded once here too."""
    algorithm.eval()
    embedded = Shuffled(embed(algorithm, test))
    head = copy.copy(algorithm)
    head._modules = {**algorithm._modules, "model": nn.Identity()}
    return [evaluated(head, embedded, ways, shots, episodes) for ways, shots in settings]


def main() -> None:
    arguments = _parse()
    chosen = [entry for entry in ENTRIES if arguments.only is None or entry.title in arguments.only]
    results: dict[str, Any] = {"rows": {}}
    if arguments.output.exists():
        results = json.loads(arguments.output.read_text())
    results |= {
        "machine": machine.describe(),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "images": arguments.images,
        "episodes": arguments.episodes,
        "backbone": BACKBONE,
        "validations": VALIDATIONS,
    }
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as temporary, pool(arguments.jobs) as workers:
        runs = str(arguments.runs or temporary)
        waiting = {
            workers.submit(run_entry, entry.title, ways, arguments.images, arguments.episodes, runs): (entry, ways)
            for entry in chosen
            for ways in entry.ways or (None,)
        }
        for done in as_completed(waiting):
            _, ways = waiting[done]
            for row in done.result():
                kept = results["rows"].setdefault(row["title"], {})
                kept[str(ways or "any")] = row
                print(f"[{time.perf_counter() - start:5.0f} s] {summary(row)}", flush=True)
            order = [title for entry in ENTRIES for title in (entry.title, *entry.variants)]
            results["rows"] = {title: results["rows"][title] for title in order if title in results["rows"]}
            arguments.output.parent.mkdir(exist_ok=True)
            arguments.output.write_text(json.dumps(results, indent=1) + "\n")


def summary(row: dict[str, Any]) -> str:
    cells = [
        f"{result['ways']}w{result['shots']}s {100 * result['mean']:.1f} ± {100 * result['ci95']:.1f}"
        for result in row["evaluations"]
    ]
    return f"{row['title']}: {', '.join(cells)} (trained in {row['seconds']} s of CPU time)"


def pool(jobs: int) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn"))


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=200_000, help="training images of a training")
    parser.add_argument("--episodes", type=int, default=600, help="test tasks of a setting")
    parser.add_argument("--jobs", type=int, default=2, help="trainings at a time, one thread each")
    parser.add_argument("--only", nargs="+", choices=[entry.title for entry in ENTRIES], metavar="TITLE")
    parser.add_argument("--runs", type=Path, help="folder to keep the run folders in; those in it are gone on with")
    parser.add_argument("--output", type=Path, default=RESULTS, help="rows that it holds and are not run stay in it")
    return parser.parse_args()


if __name__ == "__main__":
    main()
