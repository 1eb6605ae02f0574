"""Rivals that must not pass for right: another gradient, no answer, and an error; and one that tells what runs it."""

from __future__ import annotations

import sys
from typing import Any

from innerloop.bench.rivals import Step
from innerloop.bench.rivals.innerloop_step import make as make_right
from innerloop.bench.workloads import Workload


def cannot(workload: Workload, fault: str) -> str | None:
    return {"cannot": "has no such step", "tells": f"runs in {sys.prefix}"}.get(fault)


def make(workload: Workload, dtype: str, fault: str) -> Step:
    right = make_right(workload, dtype, "torch")

    def step() -> tuple[Any, Any]:
        if fault == "raises":
            raise RuntimeError("out of luck")
        loss, gradients = right()
        return loss, [1.001 * gradient for gradient in gradients]

    return step
