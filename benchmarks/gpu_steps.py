"""Times the exact MAML step on a GPU beside everything else that computes it there.

    python benchmarks/gpu_steps.py
    python benchmarks/gpu_steps.py --device cpu --quick      does everything run? on the CPU, two tasks

The rivals are those of maml.py, one after another, each a process of its own, float32 without TensorFloat-32, by wall
clock: the median of steps that are waited for. Beside the times: how far loss and gradients are from the torch
engine's, relative, which in float32 is a matter of 1e-3 for nets with ReLU and pooling, and of 1 for a wrong gradient.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

import innerloop.bench.workloads as package
from innerloop.bench.rivals import ORACLE, OURS, torch_parts
from innerloop.bench.workloads import flops
from rivals import RIVALS
from workloads import WORKLOADS

#: How many times as fast as the fastest other one the step is to be.
AIMS = {"sinusoid-k5": 5, "omniglot-k5": 3, "miniimagenet-k5": 3}
#: Those with a GPU form: for every workload those that start at once, then those that are compiled, for a minute or
#: longer. The first one's gradients are what the others' are compared with.
ROUNDS = (
    (ORACLE, OURS, "loop", "vmap", "vmap-exact", "learn2learn", "parallel-metalearn"),
    ("jax-vmap", "jax-loop", "compile"),
)
WRONG = 0.1  # a relative difference that rounding does not make (it makes 0.06); a wrong gradient is about 1 away


def put_on(device: str) -> None:
    """Nets and data are made on the CPU, the same for every device, and moved; what rivals add is made there."""

    def moved(make: Callable[..., Any], move: Callable[[Any], Any]) -> Callable[..., Any]:
        def make_and_move(*arguments: Any) -> Any:
            with torch.device("cpu"):
                made = make(*arguments)
            return move(made)

        return make_and_move

    package.make_model = moved(package.make_model, lambda model: model.to(device))
    torch_parts.batch = moved(torch_parts.batch, lambda tensors: tuple(tensor.to(device) for tensor in tensors))
    torch.set_default_device(device)


def run_one(workload_name: str, rival_name: str, device: str, quick: bool, file: str) -> dict[str, Any]:
    """A rival's time, in this process; its loss and gradients go to a file."""
    workload, rival = WORKLOADS[workload_name], RIVALS[rival_name]
    if quick:
        workload = replace(workload, tasks=2)
    if rival_name.startswith("jax"):
        import jax

        if device == "cuda" and jax.default_backend() != "gpu":
            return {"cannot": "jax sees no GPU"}
        jax.config.update("jax_default_matmul_precision", "float32")
    else:
        put_on(device)  # before the rival's module is imported
        torch.backends.cudnn.allow_tf32 = False
    reason = rival.cannot(workload)
    if reason and not (device == "cuda" and rival_name.startswith("jax")):  # what JAX is slow at is of the CPU
        return {"cannot": reason}
    step = rival.make(workload, "float32")

    def wait() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    begin = time.perf_counter()
    loss, gradients = step()
    arrays = [np.asarray(x.detach().cpu() if isinstance(x, torch.Tensor) else x) for x in (loss, *gradients)]
    first = time.perf_counter() - begin
    np.savez(file, *arrays)
    times: list[float] = []
    while len(times) < (1 if quick else 5) or (sum(times) < (0 if quick else 2000) and len(times) < 200):
        wait()
        begin = time.perf_counter()
        step()
        wait()
        times.append(1e3 * (time.perf_counter() - begin))
    return {"milliseconds": statistics.median(times), "first_seconds": first, "steps": len(times)}


def in_own_process(workload: str, rival: str, device: str, quick: bool, file: Path, seconds: float) -> dict[str, Any]:
    """By this Python, whose torch and innerloop are for the GPU, with the packages of the rival's environment."""
    if seconds <= 0:
        return {"cannot": "no time is left"}
    environment, distribution, packages = RIVALS[rival].environment, RIVALS[rival].distribution, ""
    if environment is not None and not any(metadata.distributions(name=distribution)):
        packages = sysconfig.get_path("platlib", vars={"platbase": str(environment)})
        if not Path(packages).is_dir():
            return {"cannot": f"is neither installed nor in {packages}: benchmarks/peers.sh"}
    command = [sys.executable, __file__, "--device", device, "--one", workload, rival, str(file)]
    try:
        done = subprocess.run(
            [*command, *(["--quick"] if quick else [])],
            env={**os.environ, "PYTHONPATH": packages},
            capture_output=True,
            text=True,
            timeout=seconds,
        )
    except subprocess.TimeoutExpired:
        return {"cannot": f"is not done after {seconds:.0f} s"}
    if done.returncode:
        return {"cannot": f"fails: {done.stderr.strip().splitlines()[-1:]}"}
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def difference(file: Path, oracle: Path) -> float:
    """Of the loss or of all gradients, whichever is larger, relative; NaN where the oracle has failed."""
    if not oracle.exists():
        return math.nan

    def parts(path: Path) -> list[np.ndarray]:
        with np.load(path) as saved:
            loss, *gradients = (saved[name].ravel() for name in saved.files)
            return [loss, np.concatenate(gradients)]

    pairs = zip(parts(file), parts(oracle), strict=True)
    return max(float(np.linalg.norm(mine - theirs) / np.linalg.norm(theirs)) for mine, theirs in pairs)


def compare(
    workload: str, rivals: Sequence[str], times: dict[str, float], place: Path, device: str, quick: bool, end: float
) -> None:
    """Runs rivals, two minutes each at the most and none beyond the end, and adds to the milliseconds of those before
    them."""
    work = flops(WORKLOADS[workload])
    print(f"\n{workload}: {WORKLOADS[workload].title}, K = {WORKLOADS[workload].steps}, {(work or 0) / 1e9:.2f} GFLOP")
    for rival in rivals:
        file = place / f"{workload}-{rival}.npz"
        found = in_own_process(workload, rival, device, quick, file, min(120, end - time.monotonic()))
        if "cannot" in found:
            print(f"  {RIVALS[rival].title:40} {found['cannot']}", flush=True)
            continue
        away = difference(file, place / f"{workload}-{ORACLE}.npz")
        if away < WRONG:
            times[rival] = found["milliseconds"]
        print(
            f"  {RIVALS[rival].title:40} {found['milliseconds']:10.3f} ms, first {found['first_seconds']:.1f} s, "
            f"{found['steps']} steps; {away:.1e} away{'' if away < WRONG else ': WRONG'}",
            flush=True,
        )
    others = {name: time for name, time in times.items() if name != OURS}
    if OURS in times and others:
        fastest = min(others, key=lambda name: others[name])
        ratio = others[fastest] / times[OURS]
        print(
            f"  {ratio:.2f} × as fast as {RIVALS[fastest].title}, the fastest other one so far; aim {AIMS[workload]} ×",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--quick", action="store_true", help="two tasks, one step: does everything run?")
    parser.add_argument("--workloads", nargs="+", default=list(AIMS), choices=list(AIMS))
    parser.add_argument("--seconds", type=float, default=math.inf, help="what is not done by then is left out")
    parser.add_argument("--one", nargs=3, metavar=("WORKLOAD", "RIVAL", "FILE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        workload, rival, file = arguments.one
        print(json.dumps(run_one(workload, rival, arguments.device, arguments.quick, file)))
        return
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit(
            f"gpu_steps.py: torch {torch.__version__} sees no CUDA device (--device cpu --quick: a dry run)"
        )
    end = time.monotonic() + arguments.seconds
    times: dict[str, dict[str, float]] = {workload: {} for workload in arguments.workloads}
    with tempfile.TemporaryDirectory() as place:
        for rivals in ROUNDS:
            for workload in arguments.workloads:
                compare(workload, rivals, times[workload], Path(place), arguments.device, arguments.quick, end)
    lacking = [workload for workload, found in times.items() if OURS not in found]
    if lacking:
        raise SystemExit(f"gpu_steps.py: innerloop has no right result of {', '.join(lacking)}")


if __name__ == "__main__":
    main()
