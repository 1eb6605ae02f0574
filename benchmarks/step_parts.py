"""Where the time of a step goes: the native call, the Python around it, loss.backward(); and what of it is torch's own.

    python benchmarks/step_parts.py WORKLOAD... [--threads 1 2] [--steps 3000]

Microseconds of wall clock, medians, on an idle machine. In every turn, beside the step, with caches as it leaves them:

- "an empty Function": an autograd.Function with as many parameters that computes nothing, and its backward();
- "one number": backward() of the clone of one number.

Neither is shared by threads, whatever is between them: they bound what two threads can bring.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor

from innerloop import TaskBatch, maml_loss
from innerloop.bench.rivals.innerloop_step import inner_loop_of
from innerloop.bench.rivals.torch_parts import batch
from innerloop.bench.workloads import WORKLOADS, Workload, make_model
from innerloop.ops import maml as native


class Clock:
    """Times since the last look, by what was done."""

    def __init__(self) -> None:
        self.times: dict[str, list[float]] = defaultdict(list)
        self._last = 0

    def look(self, done: str | None = None) -> None:
        now = time.perf_counter_ns()
        if done:
            self.times[done].append((now - self._last) / 1e3)
        self._last = time.perf_counter_ns()


class Empty(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: list[Tensor], gradients: list[Tensor], *parameters: Tensor) -> Tensor:
        ctx.gradients = gradients
        return loss[0]

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None
        return None, None, *gradients


def parts(workload: Workload, steps: int) -> dict[str, float]:
    """Medians of a step's parts, and of what is measured beside it."""
    model, tasks = make_model(workload, "float32"), TaskBatch(*batch(workload, "float32"))
    parameters, number = list(model.parameters()), torch.zeros((), requires_grad=True)
    options = inner_loop_of(workload, model)
    clock = Clock()
    call = native._eager_call

    def timed_call(*arguments: Any) -> list[Tensor]:
        clock.look("before the call")
        results = call(*arguments)
        clock.look("the native call")
        return results

    def forget() -> None:
        for tensor in (*parameters, number):
            tensor.grad = None

    native._eager_call = timed_call
    try:
        for _ in range(steps):
            forget()
            clock.look()
            loss = maml_loss(model, tasks, **options, engine="native")
            clock.look("after it")
            loss.backward()
            clock.look("backward()")
            gradients = [parameter.grad for parameter in parameters]
            forget()
            clock.look()
            loss = Empty.apply([loss.detach()], gradients, *parameters)
            loss.backward()
            clock.look("an empty Function")
            loss = number.clone()
            clock.look()
            loss.backward()
            clock.look("one number")
    finally:
        native._eager_call = call
    return {name: statistics.median(times[steps // 3 :]) for name, times in clock.times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workloads", nargs="+", choices=WORKLOADS, metavar="WORKLOAD")
    parser.add_argument("--threads", nargs="+", type=int, default=(1, 2))
    parser.add_argument("--steps", type=int, default=3000)
    arguments = parser.parse_args()
    for name in arguments.workloads:
        for threads in arguments.threads:
            torch.set_num_threads(threads)
            found = parts(WORKLOADS[name], arguments.steps)
            step = sum(found[part] for part in ("before the call", "the native call", "after it", "backward()"))
            texts = [f"{part} {microseconds:.1f}" for part, microseconds in found.items()]
            print(f"{WORKLOADS[name].heading}, {threads} threads: {step:.1f} µs; {', '.join(texts)}", flush=True)


if __name__ == "__main__":
    main()
