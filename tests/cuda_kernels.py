"""What every CUDA kernel costs on every architecture: ./dev cuda-kernels [--check].

Compiles csrc/cuda to the PTX of the oldest architecture, once, and that for each one that wheels carry, and reads what
ptxas says of each kernel. A kernel that spills registers or has a stack frame is an error, unless MAY_SPILL names it.
Writes docs/cuda-kernels.md; with --check it is an error instead if a kernel is missing there.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
TABLE = ROOT / "docs" / "cuda-kernels.md"
ARCHITECTURES = ("75", "80", "86", "89", "90", "100", "120")

# Kernels that are not hot, each with the reason why it may spill or have a stack frame.
MAY_SPILL: dict[str, str] = {}

HEAD = """# CUDA kernels

Made by `./dev cuda-kernels` with {compiler}: registers per thread on each architecture as ptxas reports them, and the
largest static shared memory, spilled bytes and stack frame. The PTX is that of the oldest architecture. `.ci/run`
compiles the same and fails on a spill or a stack frame. Shared memory that a launch asks for is not in the table:
`pair_sums_kernel` 4.1 KiB (8.3 KiB in float64), `cross_entropy_kernel` 2 KiB, `solve_kernel` 8·(M² + M) bytes for
systems of M ≤ 77 rows, `svm_solve_kernel` and `svm_kkt_solve_kernel` at most 48 KiB. Nothing here says how fast a
kernel is.

| kernel | {architectures} | shared | spilled | stack |
|---|{bars}---|---|---|
"""


class Use(NamedTuple):
    registers: int
    shared: int
    spilled: int
    stack: int


def compile_source(nvcc: str, place: str, source: Path) -> str:
    """What ptxas says of one file."""
    torch = find_spec("torch")
    assert torch is not None
    assert torch.origin is not None
    ptx = f"{place}/{source.stem}.ptx"
    include = ["-I", str(ROOT / "csrc"), "-isystem", str(Path(torch.origin).parent / "include")]
    options = ["-std=c++20", "-O3", "-Werror=all-warnings", "-DTORCH_TARGET_VERSION=0x020a000000000000ULL"]
    oldest = f"-arch=compute_{ARCHITECTURES[0]}"
    output(nvcc, *options, *include, oldest, "-ptx", str(source), "-o", ptx)
    ptxas = str(Path(nvcc).parent / "ptxas")
    each = (output(ptxas, "-v", "-O3", f"-arch=sm_{name}", ptx, "-o", os.devnull) for name in ARCHITECTURES)
    return "".join(each)


def output(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


REPORT = re.compile(
    r"Compiling entry function '(?P<kernel>\S+)' for 'sm_(?P<architecture>\d+)'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers[^\n]*?(?:(?P<shared>\d+) bytes smem[^\n]*)?\n",
    re.DOTALL,
)


def uses(report: str) -> dict[str, dict[str, Use]]:
    """By kernel and architecture."""
    found: dict[str, dict[str, Use]] = defaultdict(dict)
    matches = list(REPORT.finditer(report))
    names = subprocess.run(["c++filt"], input="\n".join(m["kernel"] for m in matches), capture_output=True, text=True)
    for match, name in zip(matches, names.stdout.splitlines(), strict=True):
        number = {key: int(match[key] or 0) for key in ("registers", "shared", "stores", "loads", "stack")}
        found[short(name)][match["architecture"]] = Use(
            number["registers"], number["shared"], number["stores"] + number["loads"], number["stack"]
        )
    return found


def short(name: str) -> str:
    """pair_sums_kernel<Product, float, float> of void innerloop::pair_sums_kernel<innerloop::Product, …>(…)."""
    name = re.sub(r"\(anonymous namespace\)::|innerloop::|^void ", "", name)
    return name[: name.index("(")]


def main(check: bool) -> None:
    nvcc = os.environ.get("CUDACXX") or shutil.which("nvcc")
    if nvcc is None:
        sys.exit("cuda-kernels: no nvcc (set CUDACXX, or put it on PATH)")
    compiler = subprocess.check_output([nvcc, "--version"], text=True).split("release ")[1].split(",")[0]
    with tempfile.TemporaryDirectory() as place, ThreadPoolExecutor(os.cpu_count()) as pool:
        reports = pool.map(partial(compile_source, nvcc, place), sorted((ROOT / "csrc" / "cuda").rglob("*.cu")))
        found = uses("".join(reports))
    faults, rows = [], []
    for kernel, of in sorted(found.items()):
        if set(of) != set(ARCHITECTURES):
            faults.append(f"{kernel} was compiled for {sorted(of)} only")
            continue
        shared, spilled, stack = (max(getattr(use, name) for use in of.values()) for name in Use._fields[1:])
        if (spilled or stack) and kernel.split("<")[0] not in MAY_SPILL:
            faults.append(f"{kernel} spills {spilled} bytes and has a stack frame of {stack}")
        registers = " | ".join(str(of[name].registers) for name in ARCHITECTURES)
        rows.append(f"| `{kernel}` | {registers} | {shared} | {spilled} | {stack} |")
    if not rows:
        faults.append("ptxas reported no kernel")
    if check:
        table = TABLE.read_text()
        faults += [
            f"docs/cuda-kernels.md lacks {kernel}: ./dev cuda-kernels" for kernel in found if kernel not in table
        ]
    else:
        architectures, bars = " | ".join(f"sm_{name}" for name in ARCHITECTURES), "---|" * len(ARCHITECTURES)
        head = HEAD.format(compiler=f"nvcc {compiler}", architectures=architectures, bars=bars)
        TABLE.write_text(head + "\n".join(rows) + "\n")
    for fault in faults:
        print(fault)
    print(f"{len(rows)} kernels, {len(ARCHITECTURES)} architectures, {len(faults)} faults")
    sys.exit(1 if faults else 0)


if __name__ == "__main__":
    main(check="--check" in sys.argv[1:])
