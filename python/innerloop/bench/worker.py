"""A process that runs one rival on one workload, step by step as race.py asks.

    python -m innerloop.bench.worker

A process of its own gives every rival its own threads, memory and compiler state. Standard input begins with a pickled
Order; requests follow as lines, and answers go as lines of JSON to standard output:

    first           the first step: {"wall": seconds, "megabytes": growth of memory}
    steps N         N more: {"wall": seconds, "cpu": seconds of all threads}
    save FILE       one step's loss and gradients as .npz: {}
"""

from __future__ import annotations

import json
import os
import pickle
import resource
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import numpy as np
import torch

from innerloop.bench.memory import available_bytes, forget_peak, peak_megabytes, resident_megabytes
from innerloop.bench.rivals import Order, Step


def main() -> None:
    # Libraries print; the answers keep standard output for themselves.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    def answer(**values: Any) -> None:
        answers.write(json.dumps(values) + "\n")

    order: Order = pickle.load(sys.stdin.buffer)
    torch.set_num_threads(order.threads)
    reason = order.rival.cannot(order.workload)
    if reason:
        answer(cannot=reason)
        return
    step = order.rival.make(order.workload, order.dtype)
    answer(version=version(order.rival.distribution))
    # Who needs more than there is fails, and takes no other process with it.
    resource.setrlimit(resource.RLIMIT_DATA, (available_bytes(), resource.RLIM_INFINITY))
    requests: dict[str, Callable[..., dict[str, float]]] = {"first": _first, "steps": _steps, "save": _save}
    for line in sys.stdin.buffer:
        name, *arguments = line.decode().split()
        answer(**requests[name](step, *arguments))


def _first(step: Step) -> dict[str, float]:
    forget_peak()
    before, started = resident_megabytes(), time.perf_counter()
    step()
    return {"wall": time.perf_counter() - started, "megabytes": peak_megabytes() - before}


def _steps(step: Step, count: str) -> dict[str, float]:
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(int(count)):
        step()
    return {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}


def _save(step: Step, file: str) -> dict[str, float]:
    loss, gradients = step()
    np.savez(file, np.asarray(loss), *map(np.asarray, gradients))
    return {}


if __name__ == "__main__":
    main()
