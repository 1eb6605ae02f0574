"""What the figures were measured on: processor, versions, and what one core can do at most."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import tempfile
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
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": version("numpy"),
        "innerloop": version("innerloop"),
        **_peak(),
        "sgemm_gflops": _sgemm_gflops(),
    }


def instruction_set() -> str:
    """Short for the one that the kernels run with: "avx512", "avx2", "baseline"."""
    name: str = torch.ops.innerloop.instruction_set()
    return name.partition("(")[2].rstrip(")").replace("-", "").lower() or name


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _peak() -> dict[str, float]:
    """Of one core: fused multiply-adds in GFLOP/s, copying in GB/s read and written."""
    source = Path(__file__).with_name("peak.cpp")
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "peak"
        subprocess.run(["c++", "-std=c++20", "-O3", "-march=native", str(source), "-o", str(program)], check=True)
        measured = json.loads(subprocess.run([program], check=True, capture_output=True, text=True).stdout)
    return {name: measured[name] for name in ("fma_gflops", "copy_gigabytes")}


def _sgemm_gflops() -> float:
    """torch.mm of two 1024 × 1024 matrices, one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    left, right = torch.randn(1024, 1024), torch.randn(1024, 1024)
    seconds = []
    for _ in range(20):
        start = time.process_time()
        torch.mm(left, right)
        seconds.append(time.process_time() - start)
    torch.set_num_threads(threads)
    return round(2 * 1024**3 / statistics.median(seconds) * 1e-9, 1)


if __name__ == "__main__":
    print(json.dumps(describe(), indent=1))
