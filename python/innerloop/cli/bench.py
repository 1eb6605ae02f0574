"""``innerloop bench``: what a step costs on this machine, beside the forms of code that torch alone has."""

from __future__ import annotations

import json
import math
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from innerloop.bench import machine
from innerloop.bench.race import Effort, Rows, check, measure
from innerloop.bench.rivals import ORACLE, OURS, RIVALS
from innerloop.bench.table import COLUMNS, cells
from innerloop.bench.workloads import WORKLOADS, Workload, builder, flops
from innerloop.models import output_shape
from innerloop.options import OptionError, options_of, parse_numbers, parse_pairs
from innerloop.registry import nearest

DEFAULT_WORKLOADS = ["sinusoid-k5", "mlp784-k5", "glyphs-k1"]
DEFAULT_RIVALS = [OURS, ORACLE, "loop", "vmap", "vmap-exact"]


def add_to(app: typer.Typer) -> None:
    app.command("bench")(bench)


def bench(
    workloads: Annotated[
        list[str] | None,
        typer.Argument(help=f"Of {', '.join(WORKLOADS)}.", show_default=", ".join(DEFAULT_WORKLOADS)),
    ] = None,
    net: Annotated[
        str | None,
        typer.Option(help="In place of names: a model such as conv4, or MODULE:FUNCTION(input_shape, outputs)."),
    ] = None,
    net_option: Annotated[list[str] | None, typer.Option(help="KEY=VALUE for the net; repeatable.")] = None,
    input_shape: Annotated[str, typer.Option(help="Of one sample, for --net.")] = "1,28,28",
    tasks: Annotated[int, typer.Option(help="T, for --net.")] = 8,
    ways: Annotated[int, typer.Option(help="Classes of a task, for --net.")] = 5,
    shots: Annotated[int, typer.Option(help="Support samples of a class, for --net.")] = 1,
    queries: Annotated[int, typer.Option(help="Query samples of a class, for --net.")] = 15,
    inner_steps: Annotated[int, typer.Option(help="K, for --net.")] = 1,
    first_order: Annotated[bool, typer.Option(help="Without second derivatives, for --net.")] = False,
    rival: Annotated[
        list[str] | None,
        typer.Option(help=f"Of {', '.join(RIVALS)}; repeatable.", show_default=", ".join(DEFAULT_RIVALS)),
    ] = None,
    seconds: Annotated[float, typer.Option(help="For each rival and workload.")] = 3.0,
    threads: Annotated[int, typer.Option(help="More than one: times and ratios are wall clock.")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Time a MAML step: the native engine beside the torch engine, torch loops and torch.func.vmap.

    Loss and gradients of every rival are compared with the torch engine's in float64 first, on two tasks: one that
    differs is marked wrong. Then they take turns, float32, each in a process of its own. A step is the meta-loss and
    its exact gradient; ×: the median of a rival's time over innerloop's in the same round.
    """
    if net is not None and workloads:
        raise OptionError("give names of workloads, or --net")
    if threads < 1:
        raise OptionError(f"threads is {threads}, expected at least 1")
    if net is None:
        chosen = [WORKLOADS[_known(name, list(WORKLOADS), "workload")] for name in workloads or DEFAULT_WORKLOADS]
    else:
        sizes = {"tasks": tasks, "ways": ways, "shots": shots, "queries": queries, "inner_steps": inner_steps}
        chosen = [_workload(net, net_option or [], input_shape, first_order, **sizes)]
    rivals = {name: RIVALS[_known(name, list(RIVALS), "rival")] for name in rival or DEFAULT_RIVALS}
    progress = Console(stderr=True, highlight=False, markup=False)
    described = machine.describe()
    if not as_json:
        typer.echo(
            f"{described['processor']}, cores: {described['cores']}, {described['instruction_set']}, torch "
            f"{described['torch']}; torch.mm reaches {described['sgemm_gflops']:.0f} GFLOP/s on one"
        )
    results: list[dict[str, Any]] = []
    for workload in chosen:
        with progress.status(workload.name) as status:
            checks = check(workload, rivals, RIVALS[ORACLE], status.update)
            timed = measure(workload, rivals, OURS, Effort(seconds), status.update, threads)
        rows = {name: {**checks[name], **timed[name]} for name in rivals}
        results.append({"workload": workload.name, "heading": workload.heading, "flops": flops(workload), "rows": rows})
        if not as_json:
            _print(workload, results[-1], described["sgemm_gflops"] * threads)
    if as_json:
        typer.echo(json.dumps({"machine": described, "threads": threads, "results": results}))


def _known(name: str, names: list[str], kind: str) -> str:
    if name not in names:
        raise OptionError(f"no {kind} is called {name!r}.{nearest(name, names)}")
    return name


def _workload(
    net: str,
    pairs: list[str],
    input_shape: str,
    first_order: bool,
    *,
    tasks: int,
    ways: int,
    shots: int,
    queries: int,
    inner_steps: int,
) -> Workload:
    """Random samples of the shape that is asked for; labels, or for a regression net one target each."""
    for name, value in (("tasks", tasks), ("ways", ways), ("shots", shots), ("queries", queries)):
        if value < 1:
            raise OptionError(f"{name} is {value}, expected at least 1")
    if inner_steps < 0:
        raise OptionError(f"inner_steps is {inner_steps}, expected at least 0")
    build = builder(net)
    options = parse_pairs(pairs, options_of(build), f"the net {net}")
    sample = tuple(int(size) for size in parse_numbers(input_shape))
    outputs = output_shape(build(sample, ways, **options), sample)
    if outputs != (ways,):
        raise OptionError(f"the net {net} has outputs of shape {outputs}, expected ({ways},): its second argument")
    return Workload(
        net, net, net, sample, ways, tasks, ways * shots, ways * queries, inner_steps, 0.01,
        first_order=first_order, options=options,
    )  # fmt: skip


def _print(workload: Workload, result: dict[str, Any], sgemm_gflops: float) -> None:
    table = Table("", *COLUMNS, title=escape(workload.heading), title_justify="left", box=None, pad_edge=False)
    rows: Rows = result["rows"]
    for name, row in rows.items():
        table.add_row(*map(escape, [RIVALS[name].title, *cells(row)]))
    console = Console(highlight=False)
    console.print()
    console.print(table)
    milliseconds = rows.get(OURS, {}).get("milliseconds", {}).get("median", math.nan)
    if result["flops"] and not math.isnan(milliseconds):
        rate = 1e-6 * result["flops"] / milliseconds
        console.print(
            f"{1e-9 * result['flops']:.3g} GFLOP in products and convolutions: innerloop's step does {rate:.3g} "
            f"GFLOP/s, {rate / sgemm_gflops:.0%} of torch.mm's"
        )
