"""``innerloop evaluate``: what a trained run is worth."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

from innerloop.evaluation import QUERIES, evaluate
from innerloop.runs import load_run
from innerloop.training import cpu_threads

RunFolder = Annotated[Path, typer.Argument(help="The folder of a training run.", show_default=False)]


def add_to(app: typer.Typer) -> None:
    app.command("evaluate")(evaluate_run)


def evaluate_run(
    run: RunFolder,
    split: Annotated[Literal["train", "val", "test"], typer.Option(help="Part of the data.")] = "test",
    ways: Annotated[int | None, typer.Option(help="Classes of a task; the run's.")] = None,
    shots: Annotated[int | None, typer.Option(help="Support samples of a class; the run's.")] = None,
    queries: Annotated[int, typer.Option(help="Query samples of a class.")] = QUERIES,
    episodes: Annotated[int, typer.Option(help="Number of tasks.")] = 600,
    inner_steps: Annotated[int | None, typer.Option(help="Gradient steps of the adaptation; the run's.")] = None,
    seed: Annotated[int, typer.Option(help="Of the task list.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Evaluate a run's best checkpoint on a fixed list of tasks: mean ± 95% confidence interval."""
    config, dataset, algorithm = load_run(run)
    with cpu_threads(config.training.threads):
        record = evaluate(
            algorithm,
            dataset.split(split),
            ways=config.evaluation_ways if ways is None else ways,
            shots=config.training.shots if shots is None else shots,
            queries=queries,
            episodes=episodes,
            inner_steps=inner_steps,
            seed=seed,
        )
    if as_json:
        typer.echo(json.dumps({"run": str(run), "split": split, **record.as_dict()}))
    else:
        Console(highlight=False, markup=False, soft_wrap=True).print(
            f"{config.algorithm.name} on {config.data.name} ({split}): {record}"
        )
