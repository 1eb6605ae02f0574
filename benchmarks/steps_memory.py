"""How memory grows with the inner steps: the growth of the process in its first step of training, for K = 1 … 100.

    .venv/bin/python benchmarks/steps_memory.py

One task, float32, one thread, each rival and K in a process of its own. What a library sets up at its first step is in
every column; the last one is free of it. Other work on the machine changes nothing.
"""

from __future__ import annotations

import sys
from dataclasses import replace

from innerloop.bench.race import Worker
from rivals import RIVALS
from workloads import WORKLOADS

STEPS = (1, 5, 10, 50, 100)
NETS = ("mlp784-k5", "glyphs-k1")
SHOWN = ("innerloop", "innerloop-torch", "learn2learn", "vmap-exact")


def megabytes(net: str, rival: str, steps: int) -> float:
    workload = replace(WORKLOADS[net], tasks=1, steps=steps)
    with Worker(workload, RIVALS[rival], "float32") as worker:
        return worker.ask("first")["megabytes"]


def main() -> None:
    print(f"| net, one task | | {' | '.join(f'K = {steps}' for steps in STEPS)} | MB a step |")
    print(f"|---|---|{'---|' * (len(STEPS) + 1)}")
    for net in NETS:
        for rival in SHOWN:
            found = [megabytes(net, rival, steps) for steps in STEPS]
            slope = (found[-1] - found[-3]) / (STEPS[-1] - STEPS[-3])
            cells = [*(f"{value:.1f}" for value in found), f"{slope:.2f}"]
            print(f"| {WORKLOADS[net].title} | {RIVALS[rival].title} | {' | '.join(cells)} |", flush=True)
            print(f"{net} {rival}", file=sys.stderr)


if __name__ == "__main__":
    main()
