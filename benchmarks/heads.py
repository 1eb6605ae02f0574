"""Measures the few-shot heads of innerloop beside everything else that computes them.

    benchmarks/peers.sh                                   installs the peers, once
    .venv/bin/python benchmarks/heads.py                  everything, into benchmarks/results/heads-INSTRUCTION SET.json
    .venv/bin/python benchmarks/report.py                 docs/heads.md and heads-avx2.md from them

A step takes embeddings of support and query that require a gradient, to the loss averaged over the tasks, and back. How
it is measured: innerloop.bench.race. One thread, CPU time.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import machine
from head_workloads import HEAD_WORKLOADS
from innerloop.bench.race import Effort, check, measure, summary
from rivals import HEADS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = list(HEAD_WORKLOADS)
    default = Path(__file__).parent / "results" / f"heads-{machine.instruction_set()}.json"
    parser.add_argument("--workloads", nargs="+", default=names, choices=names, metavar="NAME")
    parser.add_argument("--rivals", nargs="+", default=list(HEADS), choices=list(HEADS), metavar="NAME")
    parser.add_argument("--seconds", type=float, default=Effort.seconds, help="for each rival and workload")
    parser.add_argument("--output", type=Path, default=default)
    arguments = parser.parse_args()

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    results: dict[str, Any] = {"checks": {}, "races": {}}
    if arguments.output.exists():
        results = json.loads(arguments.output.read_text())
    results["machine"] = machine.describe(results.get("machine"))
    for workload in (HEAD_WORKLOADS[name] for name in arguments.workloads):
        rivals = {name: HEADS[name] for name in arguments.rivals if name.startswith(workload.kind)}
        checks = check(workload, rivals, HEADS[f"{workload.kind}-reference"], say)
        results["checks"].setdefault(workload.name, {}).update(checks)
        rows = measure(workload, rivals, f"{workload.kind}-innerloop", Effort(arguments.seconds), say)
        run = machine.this_run()
        results["races"][workload.name] = {**run, "flops": workload.flops, "rows": rows}
        say(summary(workload, rivals, rows))
        arguments.output.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
