"""Times the exact MAML step on a GPU beside everything else that computes it there.

    python benchmarks/gpu_steps.py
    python benchmarks/gpu_steps.py --device cpu --quick      does everything run? on the CPU, two tasks

The rivals are those of maml.py, one after another, each a process of its own, float32, by wall clock: the median of
steps that are waited for. Beside the times: how far loss and gradients are from the torch engine's, relative, which in
float32 is a matter of 1e-3 for nets with ReLU and pooling, and of 1 for a wrong gradient.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from innerloop.bench.rivals import ORACLE, OURS
from innerloop.bench.workloads import flops
from rivals import RIVALS
from workloads import WORKLOADS

#: How many times as fast as the fastest other one the step is to be.
AIMS = {"sinusoid-k5": 5, "omniglot-k5": 3, "miniimagenet-k5": 3}
#: Those with a GPU form. The first is what the others' gradients are compared with.
NAMES = (ORACLE, OURS, "loop", "vmap", "vmap-exact", "compile", "learn2learn", "parallel-metalearn", "jax-vmap")
WRONG = 0.1  # a relative difference that rounding does not make


def run_one(workload_name: str, rival_name: str, device: str, quick: bool, file: str) -> dict[str, Any]:
    """A rival's time, in this process; its loss and gradients go to a file."""
    if rival_name.startswith("jax"):
        import jax

        if device == "cuda" and jax.default_backend() != "gpu":
            return {"cannot": "jax sees no GPU"}
    elif device == "cuda":
        # Rivals are written for the CPU: here all that they make is on the GPU.
        from_numpy = torch.from_numpy
        torch.from_numpy = lambda array: from_numpy(array).cuda()
        torch.set_default_device("cuda")
    workload, rival = WORKLOADS[workload_name], RIVALS[rival_name]
    if quick:
        workload = replace(workload, tasks=2)
    reason = rival.cannot(workload)
    if reason:
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


def in_own_process(workload: str, rival: str, device: str, quick: bool, file: Path) -> dict[str, Any]:
    """By this Python, whose torch and innerloop are for the GPU, with the packages of the rival's environment."""
    packages = ""
    environment = RIVALS[rival].environment
    if environment is not None:
        packages = sysconfig.get_path("platlib", vars={"platbase": str(environment)})
        if not Path(packages).is_dir():
            return {"cannot": f"is not in {packages}: benchmarks/peers.sh"}
    command = [sys.executable, __file__, "--device", device, "--one", workload, rival, str(file)]
    try:
        done = subprocess.run(
            [*command, *(["--quick"] if quick else [])],
            env={**os.environ, "PYTHONPATH": packages},
            capture_output=True,
            text=True,
            timeout=120,
        )
    except subprocess.TimeoutExpired:
        return {"cannot": "is not done after 120 s"}
    if done.returncode:
        return {"cannot": f"fails: {done.stderr.strip().splitlines()[-1:]}"}
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def difference(file: Path, oracle: Path) -> float:
    """Of the loss or of all gradients, whichever is larger, relative."""

    def parts(path: Path) -> list[np.ndarray]:
        with np.load(path) as saved:
            loss, *gradients = (saved[name].ravel() for name in saved.files)
            return [loss, np.concatenate(gradients)]

    pairs = zip(parts(file), parts(oracle), strict=True)
    return max(float(np.linalg.norm(mine - theirs) / np.linalg.norm(theirs)) for mine, theirs in pairs)


def compare(workload: str, device: str, quick: bool) -> None:
    work = flops(WORKLOADS[workload])
    print(f"\n{workload}: {WORKLOADS[workload].title}, K = {WORKLOADS[workload].steps}, {(work or 0) / 1e9:.2f} GFLOP")
    times: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as place:
        for rival in NAMES:
            file = Path(place) / f"{rival}.npz"
            found = in_own_process(workload, rival, device, quick, file)
            if "cannot" in found:
                print(f"  {RIVALS[rival].title:40} {found['cannot']}", flush=True)
                continue
            away = difference(file, Path(place) / f"{ORACLE}.npz")
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
        print(f"  {ratio:.2f} × as fast as {RIVALS[fastest].title}, the fastest other one; aim {AIMS[workload]} ×")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--quick", action="store_true", help="two tasks, one step: does everything run?")
    parser.add_argument("--workloads", nargs="+", default=list(AIMS), choices=list(AIMS))
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
    for workload in arguments.workloads:
        compare(workload, arguments.device, arguments.quick)


if __name__ == "__main__":
    main()
