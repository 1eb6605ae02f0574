"""How memory grows with the inner steps: the growth of the process in one step of training, for K = 1 … 100.

    .venv/bin/python benchmarks/steps_memory.py

One task of the net of glyphs-k1, and of mlp784-k5, float32, one thread, each rival and K in a process of its own, whose
peak before the step is forgotten. Other work on the machine changes nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import torch

from memory import forget_peak, peak_megabytes, resident_megabytes
from rivals import ALL_RIVALS
from workloads import WORKLOADS

HERE = Path(__file__).parent
PEERS = HERE.parent / ".cache" / "peers"
STEPS = (1, 5, 10, 50, 100)
NETS = ("mlp784-k5", "glyphs-k1")
SHOWN = ("innerloop", "innerloop-torch", "learn2learn", "vmap-exact")


def megabytes(net: str, rival: str, steps: int) -> float:
    """In this process, which has done a step of one inner step before: the growth of its memory in the next one."""
    torch.set_num_threads(1)
    workload = replace(WORKLOADS[net], tasks=1, steps=1)
    ALL_RIVALS[rival].make(workload, "float32")()
    step = ALL_RIVALS[rival].make(replace(workload, steps=steps), "float32")
    forget_peak()
    before = resident_megabytes()
    step()
    return peak_megabytes() - before


def measure(net: str, rival: str, steps: int) -> float:
    peer = ALL_RIVALS[rival].peer
    path = os.pathsep.join([str(HERE), *([str(PEERS / peer)] if peer else [])])
    command = [sys.executable, __file__, "--one", net, rival, str(steps)]
    done = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, check=True
    )
    return float(json.loads(done.stdout.splitlines()[-1]))


def table() -> str:
    lines = [
        f"| net, one task | | {' | '.join(f'K = {steps}' for steps in STEPS)} | MB a step |",
        f"|---|---|{'---|' * (len(STEPS) + 1)}",
    ]
    for net in NETS:
        for rival in SHOWN:
            found = [measure(net, rival, steps) for steps in STEPS]
            slope = (found[-1] - found[-3]) / (STEPS[-1] - STEPS[-3])
            cells = [
                WORKLOADS[net].title,
                ALL_RIVALS[rival].title,
                *(f"{value:.1f}" for value in found),
                f"{slope:.2f}",
            ]
            lines.append(f"| {' | '.join(cells)} |")
            print(lines[-1], file=sys.stderr)
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="How memory grows with the inner steps.")
    parser.add_argument("--one", nargs=3, metavar=("NET", "RIVAL", "K"), help="measure in this process alone")
    given = parser.parse_args()
    if given.one:
        net, rival, steps = given.one
        print(json.dumps(megabytes(net, rival, int(steps))))
    else:
        print(table())


if __name__ == "__main__":
    main()
