"""Measures the exact MAML step of innerloop beside everything else that computes it.

    benchmarks/peers.sh                                   installs the peers, once
    .venv/bin/python benchmarks/maml.py                   everything, into benchmarks/results/
    .venv/bin/python benchmarks/report.py                 the pages of docs/ from it

First every rival's gradient is compared, in float64, with innerloop's torch engine; one that differs is marked and its
time does not count. Then all of them, each a process of its own, take turns at a workload, float32: one sample each in
a round, so that whatever else the machine does meets all alike. One thread, CPU time; ratios are taken within rounds.
The second part compares two threads with one by wall clock, and is of use on an idle machine only.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Iterable, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import machine
from innerloop.lowering import lower
from race import (
    CHECKED_TASKS,
    HERE,
    Contestant,
    Effort,
    Rows,
    Worker,
    WorkerError,
    check,
    measure,
    race,
    spread,
    summary,
)
from rivals import OURS, RIVALS
from workloads import WORKLOADS, Workload, make_model

ORACLE = "innerloop-torch"
PARTS = ("check", "race", "threads")

RIVALS_OF_GROUP = {
    "rivals": list(RIVALS),
    "tasks": [OURS, "innerloop-op", ORACLE, "loop", "jax-vmap", "jax-loop"],
    "torch": [OURS, "innerloop-op", ORACLE],
}

QUICK = Effort(0.0, 1, 1, CHECKED_TASKS)


def measure_threads(workload: Workload, rivals: Iterable[str], effort: Effort) -> Rows:
    """Wall clock with one thread and with two, in turns; the ratio is two threads' time to one's."""
    rows: Rows = {}
    for rival in rivals:
        try:
            with (
                Worker(workload, rival, "float32", 1, effort.tasks) as one,
                Worker(workload, rival, "float32", 2, effort.tasks) as two,
            ):
                pair = {"one": Contestant(one, clock="wall"), "two": Contestant(two, clock="wall")}
                for contestant in pair.values():
                    contestant.start()
                race(pair, "one", effort)
            rows[rival] = {"one": spread(pair["one"].samples), **pair["two"].row()}
        except WorkerError as failure:
            rows[rival] = {"failed": str(failure)}
    return rows


# --- the command --------------------------------------------------------------------------------


def main() -> None:
    arguments = _parse(sys.argv[1:])
    effort = QUICK if arguments.quick else Effort(arguments.seconds)

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    results: dict[str, Any] = {"checks": {}, "races": {}, "threads": {}}
    if arguments.output and arguments.output.exists():
        results = json.loads(arguments.output.read_text())
    results["machine"] = machine.describe()
    run = {"date": datetime.now(timezone.utc).date().isoformat(), "command": shlex.join(["maml.py", *sys.argv[1:]])}
    for workload in (WORKLOADS[name] for name in arguments.workloads):
        rivals = [name for name in RIVALS_OF_GROUP[workload.group] if name in arguments.rivals]
        if "check" in arguments.parts and workload.group != "tasks":
            results["checks"].setdefault(workload.name, {}).update(check(workload, rivals, ORACLE, say))
        if "race" in arguments.parts:
            rows = measure(workload, rivals, OURS, effort, say)
            results["races"][workload.name] = {**run, "flops": flops(workload), "rows": rows}
            say(summary(workload, rows))
        if "threads" in arguments.parts and workload.group == "rivals":
            rows = measure_threads(
                workload, [name for name in (OURS, "innerloop-op", "loop") if name in rivals], effort
            )
            results["threads"][workload.name] = {**run, "rows": rows}
            say(f"{workload.name}: two threads {rows}")
        if arguments.output:
            arguments.output.parent.mkdir(exist_ok=True)
            arguments.output.write_text(json.dumps(results, indent=1) + "\n")


def flops(workload: Workload) -> int | None:
    """Of the products and convolutions of a step; None where Program.cost() does not say."""
    if workload.adapt != "all":
        return None
    cost = lower(make_model(workload, "float32")).cost(
        workload.sample, workload.support, workload.query, workload.steps, workload.first_order
    )
    return cost.flops * workload.tasks


def _parse(words: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workloads", nargs="+", default=list(WORKLOADS), choices=list(WORKLOADS), metavar="NAME")
    parser.add_argument("--rivals", nargs="+", default=list(RIVALS), choices=list(RIVALS), metavar="NAME")
    parser.add_argument("--seconds", type=float, default=Effort.seconds, help="for each rival and workload")
    parser.add_argument("--quick", action="store_true", help="two tasks, one sample: does everything run?")
    parser.add_argument(
        "--parts", nargs="+", default=PARTS, choices=PARTS, help="gradients in float64, the race, two threads"
    )
    parser.add_argument(
        "--output", type=Path, help="JSON to write; workloads that it already holds and are not run stay in it"
    )
    arguments = parser.parse_args(words)
    if arguments.output is None and not arguments.quick:
        arguments.output = HERE / "results" / f"maml-{machine.instruction_set()}.json"
    return arguments


if __name__ == "__main__":
    main()
