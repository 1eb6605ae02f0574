"""What the figures were measured on: processor, versions, and what torch.mm reaches."""

from __future__ import annotations

import os
import platform
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import innerloop._library  # noqa: F401 (defines the ops)


def describe() -> dict[str, Any]:
    return {
        "processor": _processor(),
        "instruction_set": torch.ops.innerloop.instruction_set(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": version("numpy"),
        "innerloop": version("innerloop"),
        "sgemm_gflops": _sgemm_gflops(),
    }


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _sgemm_gflops() -> float:
    """torch.mm of two 1024 × 1024 matrices, one thread: the best of 20, for others may use the machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    left, right = torch.randn(1024, 1024), torch.randn(1024, 1024)
    seconds = []
    for _ in range(20):
        start = time.process_time()
        torch.mm(left, right)
        seconds.append(time.process_time() - start)
    torch.set_num_threads(threads)
    return round(2 * 1024**3 / min(seconds) * 1e-9, 1)
