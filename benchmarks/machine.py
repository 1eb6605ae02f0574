"""What innerloop.bench says of the machine, and what one of its cores can do at most; and how a run is told of."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import tempfile
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from innerloop.bench import machine


def describe(before: dict[str, Any] | None = None) -> dict[str, Any]:
    """The machine today. before: an earlier description: of the same machine's limits the highest count, for whatever
    else runs lowers them."""
    now = {**machine.describe(), **_peak()}
    if before is None or any(before[what] != now[what] for what in ("processor", "instruction_set", "cores")):
        return now
    limits = [name for name in now if name.endswith(("_gflops", "_gigabytes"))]
    return {**now, **{name: max(now[name], before.get(name, 0)) for name in limits}}


def instruction_set() -> str:
    """Short for the one that the kernels run with: "avx512", "avx2", "baseline"."""
    name: str = torch.ops.innerloop.instruction_set()
    return name.partition("(")[2].rstrip(")").replace("-", "").lower() or name


def this_run() -> dict[str, Any]:
    """The date, the words that repeat it, and whether others were in the way: processes that wanted to run, over the
    last quarter of an hour; and whether this one went before them."""
    return {
        "date": datetime.now(timezone.utc).date().isoformat(),
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "load": round(os.getloadavg()[2], 1),
        "real_time": is_real_time(),
    }


def is_real_time() -> bool:
    """Whether this process goes before others (chrt -f 10)."""
    return os.sched_getscheduler(0) == os.SCHED_FIFO


def _peak() -> dict[str, float]:
    """Of one core: fused multiply-adds in GFLOP/s, copying in GB/s read and written."""
    source = Path(__file__).with_name("peak.cpp")
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "peak"
        subprocess.run(["c++", "-std=c++20", "-O3", "-march=native", str(source), "-o", str(program)], check=True)
        measured = json.loads(subprocess.run([program], check=True, capture_output=True, text=True).stdout)
    return {name: measured[name] for name in ("fma_gflops", "copy_gigabytes")}


if __name__ == "__main__":
    print(json.dumps(describe(), indent=1))
