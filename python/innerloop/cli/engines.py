"""``innerloop explain``, and what training prints of the engines: what they make of a model, what a step costs."""

from __future__ import annotations

import inspect
import statistics
import time
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import nn

from innerloop import models
from innerloop.contract import Algorithm, Dataset
from innerloop.explanation import explanation
from innerloop.losses import Loss
from innerloop.native_engine import why_not_native
from innerloop.options import OptionError, options_of, parse_numbers, parse_pairs
from innerloop.runs import load_run
from innerloop.tasks import TaskBatch
from innerloop.training import TrainingSettings, cpu_threads


def add_to(app: typer.Typer) -> None:
    app.command("explain")(explain)


def explain(
    run: Annotated[Path | None, typer.Argument(help="The folder of a training run.", show_default=False)] = None,
    model: Annotated[str | None, typer.Option(help=f"In place of a run: {', '.join(models.BUILDERS)}.")] = None,
    model_option: Annotated[list[str] | None, typer.Option(help="KEY=VALUE for the model; repeatable.")] = None,
    input_shape: Annotated[str | None, typer.Option(help="Of one sample, such as 3,84,84; the model's.")] = None,
    tasks: Annotated[int, typer.Option(help="T, of the batch that is planned for.")] = 8,
    ways: Annotated[int, typer.Option(help="Classes of a task.")] = 5,
    shots: Annotated[int, typer.Option(help="Support samples of a class.")] = 1,
    queries: Annotated[int, typer.Option(help="Query samples of a class.")] = 15,
    inner_steps: Annotated[int, typer.Option(help="Gradient steps of the adaptation.")] = 1,
) -> None:
    """Show what the native engine makes of a model, and how each layer will be computed; or why it cannot run it."""
    if (run is None) == (model is None):
        raise OptionError("give the folder of a run, or --model")
    if run is not None:
        _, dataset, algorithm = load_run(run)
        batch = dataset.split("train").sample(tasks, ways, shots, queries, seed=0)
        network: nn.Module = algorithm.model
    else:
        assert model is not None
        network, batch = _built(model, model_option or [], input_shape, (tasks, ways, shots, queries))
    loss: Loss = "cross_entropy" if batch.is_classification else "mse"
    typer.echo(explanation(network, loss, batch, inner_steps=inner_steps))


def _built(
    name: str, pairs: list[str], input_shape: str | None, sizes: tuple[int, int, int, int]
) -> tuple[nn.Module, TaskBatch]:
    """(a model by name, random tasks for it)."""
    tasks, ways, shots, queries = sizes
    builder = models.build(name)
    defaults = {key: option.default for key, option in inspect.signature(builder).parameters.items()}
    shape = defaults["input_shape"] if input_shape is None else tuple(int(n) for n in parse_numbers(input_shape))
    is_regression = defaults["outputs"] == 1
    options = parse_pairs(pairs, options_of(builder), f"the model {name}")
    network = builder(shape, 1 if is_regression else ways, **options)

    def side(samples: int) -> tuple[torch.Tensor, torch.Tensor]:
        x = torch.randn(tasks, samples, *shape)
        if is_regression:
            return x, torch.randn(tasks, samples, 1)
        return x, (torch.arange(samples) % ways).expand(tasks, samples)

    return network, TaskBatch(*side(ways * shots), *side(ways * queries))


def compare(algorithm: Algorithm, dataset: Dataset, settings: TrainingSettings, seconds: float = 10.0) -> str | None:
    """What a training step took with the native engine, and takes with the torch engine: both measured, in turns.

    Args:
        algorithm: trained; its parameters are left as they are. dataset: to draw the batches of training from.
        seconds: of the torch engine, after which no further step is measured.

    Returns: a sentence; None where the algorithm has no choice of engine, or its steps do not use the native one.
    """
    chosen = getattr(algorithm, "engine", None)
    inner_loop = getattr(algorithm, "inner_loop", None)
    if chosen not in ("auto", "native") or inner_loop is None:
        return None

    def batch(number: int) -> TaskBatch:
        first = number * settings.meta_batch_size
        return dataset.sample(
            settings.meta_batch_size, settings.ways, settings.shots, settings.queries, settings.seed, first_task=first
        )

    if why_not_native(algorithm.model, batch(0), inner_loop(batch(0).is_classification)) is not None:
        return None

    def measure(engine: str, threads: int, number: int) -> float:
        tasks = batch(number)
        algorithm.engine = engine  # type: ignore[assignment]
        with cpu_threads(threads):
            start = time.perf_counter()
            algorithm(tasks).loss.backward()
            taken = time.perf_counter() - start
        algorithm.zero_grad()
        return taken

    with cpu_threads(settings.threads):
        threads = torch.get_num_threads()
    try:
        measure("native", threads, 0)  # each engine's first step is slower
        # A task's tensors may be too small to share between threads: the torch engine has the better of two choices.
        torch_threads = min({threads, 1}, key=lambda count: measure("torch", count, 0))
        native: list[float] = []
        by_torch: list[float] = []
        while len(by_torch) < 20 and sum(by_torch) < seconds:
            native.append(measure("native", threads, len(native) + 1))
            by_torch.append(measure("torch", torch_threads, len(by_torch) + 1))
    finally:
        algorithm.engine = chosen
    fast, slow = statistics.median(native), statistics.median(by_torch)
    return (
        f"A step takes {1000 * fast:.1f} ms with the native engine ({_threads(threads)}) and {1000 * slow:.1f} ms with "
        f"the torch engine ({_threads(torch_threads)}), {slow / fast:.1f} times as long: medians of {len(native)} "
        f"step{'s' * (len(native) > 1)} of each, in turns."
    )


def _threads(count: int) -> str:
    return "1 thread" if count == 1 else f"{count} threads"
