"""At how many nodes communication takes as long as computation, on paper (docs/distributed.md).

    .venv/bin/python benchmarks/network.py [--gigabits 10] [--tasks 1]

Computing: the floating-point operations of a core's tasks (Program.cost), at the speed that a core reaches on a task of
Conv4, measured here (CPU time). Sending: with N nodes 2 (N - 1) / N of the gradients' bytes, and 2 (N - 1) messages
between neighbours one after another: a ring.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace

import torch

import innerloop
from innerloop import TaskBatch
from innerloop.bench.rivals.torch_parts import batch
from innerloop.bench.workloads import Workload, flops, make_model
from workloads import WORKLOADS

NETS = ("omniglot-k1", "miniimagenet-k5", "resnet12-k1")
STEPS = (1, 5)
MESSAGE = 50e-6  # seconds from neighbour to neighbour
NODES = (2, 16, 128, 1024)


def one_task(name: str, steps: int) -> Workload:
    return replace(WORKLOADS[name], tasks=1, steps=steps)


def speed() -> float:
    """Operations a second of one thread, on a task of the first net."""
    workload = one_task(NETS[0], 1)
    model, tasks = make_model(workload, "float32"), TaskBatch(*batch(workload, "float32"))
    times = []
    for _ in range(5):
        start = time.process_time()
        innerloop.maml_loss(model, tasks, inner_lr=0.1, engine="native").backward()
        times.append(time.process_time() - start)
    operations = flops(workload)
    assert operations is not None
    return operations / min(times)


def main() -> None:
    parser = argparse.ArgumentParser(description="At how many nodes communication dominates.")
    parser.add_argument("--gigabits", type=float, default=10.0, help="of the network, a second")
    parser.add_argument("--tasks", type=int, default=1, help="of a core, a step")
    given = parser.parse_args()
    torch.set_num_threads(1)
    a_second = speed()

    def sending(megabytes: float, nodes: int) -> float:
        """Seconds."""
        return 2 * (nodes - 1) * (megabytes * 8e-3 / given.gigabits / nodes + MESSAGE)

    heads = ["net", "K", "Gflop a task", "computing, ms", "gradients, MB", *(f"{n:,} nodes, ms" for n in NODES)]
    print(f"| {' | '.join(heads)} | as long as computing |")
    print(f"|{'---|' * (len(heads) + 1)}")
    for name in NETS:
        for steps in STEPS:
            workload = one_task(name, steps)
            operations = flops(workload)
            assert operations is not None
            seconds = given.tasks * operations / a_second
            megabytes = 4e-6 * sum(parameter.numel() for parameter in make_model(workload, "float32").parameters())
            limit = next(n for n in range(2, 10**7) if sending(megabytes, n) >= seconds)
            cells = [workload.title, str(steps), f"{operations / 1e9:.1f}", f"{1000 * seconds:.0f}", f"{megabytes:.2f}"]
            cells += [f"{1000 * sending(megabytes, n):.1f}" for n in NODES]
            print(f"| {' | '.join(cells)} | {limit:,} nodes |")
    print(f"\n{a_second / 1e9:.0f} Gflop/s a core, {given.tasks} task(s) a core, {given.gigabits:g} Gbit/s.")


if __name__ == "__main__":
    main()
