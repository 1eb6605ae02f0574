"""Measures the exact MAML step of innerloop beside everything else that computes it.

    benchmarks/peers.sh                                   installs the peers, once
    .venv/bin/python benchmarks/maml.py                   everything, into benchmarks/results/
    .venv/bin/python benchmarks/report.py                 the pages and pictures of docs/ from it

First every rival's gradient is compared, in float64, with innerloop's torch engine; one that differs is marked and its
time does not count. Then all of them, each a process of its own, take turns at a workload, float32: one sample each in
a round, so that whatever else the machine does meets all alike. One thread, CPU time; ratios are taken within rounds.
The second part compares two threads with one by wall clock, and is of use on an idle machine only. On a busy one,
chrt -f 10 before the command keeps others out; JAX, which it distorts, is left out then. `innerloop bench` is
the same harness with the rivals that torch alone has.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import machine
from innerloop.bench.race import CHECKED_TASKS, Effort, check, measure, measure_threads, summary
from innerloop.bench.rivals import ORACLE, OURS
from innerloop.bench.workloads import flops
from rivals import RIVALS
from workloads import WORKLOADS

RESULTS = Path(__file__).parent / "results"
PARTS = ("check", "race", "threads")

RIVALS_OF_GROUP = {
    "rivals": list(RIVALS),
    "tasks": [OURS, "innerloop-op", ORACLE, "loop", "jax-vmap", "jax-loop"],
    "steps": [OURS, ORACLE, "learn2learn", "vmap-exact", "vmap"],
    "torch": [OURS, "innerloop-op", ORACLE],
}
#: Whose workloads are others' with one number changed: those were checked.
UNCHECKED = ("tasks", "steps")

QUICK = Effort(0.0, 1, 1, CHECKED_TASKS)


def main() -> None:
    arguments = _parse(sys.argv[1:])
    effort = QUICK if arguments.quick else Effort(arguments.seconds, arguments.least)

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    left_out = [name for name in RIVALS if RIVALS[name].distribution == "jax"] if machine.is_real_time() else []
    if left_out:
        say(
            f"at real-time priority JAX's two threads take 0.5 to 1.7 times its CPU time: without {', '.join(left_out)}"
        )
    results: dict[str, Any] = {"checks": {}, "races": {}, "threads": {}}
    if arguments.output and arguments.output.exists():
        results = json.loads(arguments.output.read_text())
    results["machine"] = machine.describe(results.get("machine"))
    for workload in (WORKLOADS[name] for name in arguments.workloads):
        names = [name for name in RIVALS_OF_GROUP[workload.group] if name in arguments.rivals and name not in left_out]
        rivals = {name: RIVALS[name] for name in names}
        if "check" in arguments.parts and workload.group not in UNCHECKED:
            checks = check(workload, rivals, RIVALS[ORACLE], say)
            results["checks"].setdefault(workload.name, {}).update(checks)
        if "race" in arguments.parts:
            rows = measure(workload, rivals, OURS, effort, say)
            run = machine.this_run()
            say(summary(workload, rivals, rows))
            if arguments.add and workload.name in results["races"]:
                # Timed beside ours, whose row stays that of the run with all.
                added = {name: {**row, "run": run} for name, row in rows.items() if name != OURS}
                results["races"][workload.name]["rows"].update(added)
            else:
                results["races"][workload.name] = {**run, "flops": flops(workload), "rows": rows}
        if "threads" in arguments.parts and workload.group == "rivals":
            timed = {name: rivals[name] for name in (OURS, "innerloop-op", "loop") if name in rivals}
            rows = measure_threads(workload, timed, effort)
            results["threads"][workload.name] = {**machine.this_run(), "rows": rows}
            say(f"{workload.name}: two threads {rows}")
        if arguments.output:
            arguments.output.parent.mkdir(exist_ok=True)
            arguments.output.write_text(json.dumps(results, indent=1) + "\n")


def _parse(words: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workloads", nargs="+", default=list(WORKLOADS), choices=list(WORKLOADS), metavar="NAME")
    parser.add_argument("--rivals", nargs="+", default=list(RIVALS), choices=list(RIVALS), metavar="NAME")
    parser.add_argument("--seconds", type=float, default=Effort.seconds, help="for each rival and workload")
    parser.add_argument("--least", type=int, default=Effort.least, help="samples of each, whatever they take")
    parser.add_argument("--quick", action="store_true", help="two tasks, one sample: does everything run?")
    parser.add_argument(
        "--parts", nargs="+", default=PARTS, choices=PARTS, help="gradients in float64, the race, two threads"
    )
    parser.add_argument(
        "--output", type=Path, help="JSON to write; workloads that it already holds and are not run stay in it"
    )
    parser.add_argument(
        "--add", action="store_true", help="add these rivals' rows to a workload's, in place of beginning anew"
    )
    arguments = parser.parse_args(words)
    if arguments.output is None and not arguments.quick:
        arguments.output = RESULTS / f"maml-{machine.instruction_set()}.json"
    return arguments


if __name__ == "__main__":
    main()
