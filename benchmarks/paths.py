"""What each specialised path of the native engine brings: the time of a step with all of them, and with one off.

    python benchmarks/paths.py WORKLOAD... [--repeats 7]

One thread, CPU time, median; the variants take turns.
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import replace

import torch

from innerloop import TaskBatch, native_engine
from innerloop.bench.workloads import WORKLOADS, Workload, make_arrays, make_model
from innerloop.inner_loop import InnerLoop
from innerloop.ops import maml as native

PATHS = ("lanes", "low_rank", "conv_block", "winograd", "patch_moments", "kept_passes")
AUTOMATIC, OFF = 1, 0


def step_times(workload: Workload, repeats: int) -> dict[str, float]:
    """Milliseconds for all tasks, by what is left out."""
    model = make_model(workload, "float32")
    tasks = TaskBatch(*map(torch.from_numpy, make_arrays(workload, "float32")))
    inner = InnerLoop.create(
        model,
        inner_lr=workload.inner_lr,
        inner_steps=workload.steps,
        first_order=workload.first_order,
        loss=workload.loss,
    )
    *arguments, settings = native_engine.native_call(model, tasks, inner)
    variants = {"nothing": [AUTOMATIC] * len(PATHS), "all of them": [OFF] * len(PATHS)}
    for left_out in PATHS:
        variants[left_out] = [OFF if path == left_out else AUTOMATIC for path in PATHS]
    times: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(repeats):
        for name, paths in variants.items():
            start = time.thread_time()
            native.maml(*arguments, replace(settings, paths=paths))
            times[name].append(1e3 * (time.thread_time() - start))
    return {name: statistics.median(values) for name, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workloads", nargs="+", choices=WORKLOADS, metavar="WORKLOAD", help=", ".join(WORKLOADS))
    parser.add_argument("--repeats", type=int, default=7)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for name in arguments.workloads:
        times = step_times(WORKLOADS[name], arguments.repeats)
        print(f"{name}: {times['nothing']:.4g} ms", flush=True)
        for left_out, milliseconds in times.items():
            if left_out != "nothing":
                print(f"    without {left_out}: {milliseconds:.4g} ms, × {milliseconds / times['nothing']:.2f}")


if __name__ == "__main__":
    main()
