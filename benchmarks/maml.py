"""Measures the exact MAML step of innerloop beside everything else that computes it.

    benchmarks/peers.sh                                   installs the peers, once
    .venv/bin/python benchmarks/maml.py                   everything, into benchmarks/results/maml.json
    .venv/bin/python benchmarks/report.py                 docs/benchmarks.md from it

First every rival's gradient is compared, in float64, with innerloop's torch engine; one that differs is marked and its
time does not count. Then all of them, each a process of its own, take turns at a workload, float32: one sample each in
a round, so that whatever else the machine does meets all alike. One thread, CPU time; ratios are taken within rounds.
The second part compares two threads with one by wall clock, and is of use on an idle machine only.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np

import machine
from rivals import OURS, RIVALS
from workloads import WORKLOADS, Workload

HERE = Path(__file__).parent
PEERS = HERE.parent / ".cache" / "peers"

ORACLE = "innerloop-torch"
EXACT = 1e-9
#: Tasks of the comparison in float64: enough to see every term, few enough for the slow.
CHECKED_TASKS = 2

RIVALS_OF_GROUP = {
    "rivals": list(RIVALS),
    "tasks": [OURS, "innerloop-op", ORACLE, "loop", "jax-vmap", "jax-map"],
    "torch": [OURS, "innerloop-op", ORACLE],
}


class WorkerError(RuntimeError):
    """A rival that failed; the message is the last line it wrote."""


class Worker:
    """A process of worker.py, and the words exchanged with it."""

    def __init__(self, workload: Workload, rival: str, dtype: str, threads: int = 1, tasks: int | None = None) -> None:
        count = str(threads)
        peer = RIVALS[rival].peer
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115, closed by close()
        self._process = subprocess.Popen(
            [sys.executable, str(HERE / "worker.py"), workload.name, rival, dtype, count, str(tasks or workload.tasks)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join([str(HERE), *([str(PEERS / peer)] if peer else [])]),
                **dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), count),
                "NPROC": count,  # the size of XLA's pool
                "XLA_FLAGS": f"--xla_cpu_multi_thread_eigen={'true' if threads > 1 else 'false'}",
                "JAX_PLATFORMS": "cpu",
                "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1",  # a first call is a first call
            },
        )
        try:
            self.greeting = self._read()
        except WorkerError:
            self.close()
            raise

    def ask(self, request: str) -> dict[str, float]:
        assert self._process.stdin is not None
        self._process.stdin.write(request + "\n")
        self._process.stdin.flush()
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if line:
            return json.loads(line)
        status = self._process.wait()
        self._errors.seek(0)
        last = [text for text in self._errors.read().splitlines() if text.strip()][-1:]
        raise WorkerError(last[0].strip() if last else f"ended with status {status}")

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()
        self._errors.close()


# --- is it the same gradient? -------------------------------------------------------------------


def gradient_error(workload: Workload, rival: str, reference: np.ndarray) -> float:
    """‖g − reference‖ / ‖reference‖ over the meta-loss and the gradients of all parameters, float64."""
    return float(np.linalg.norm(float64_gradient(workload, rival) - reference) / np.linalg.norm(reference))


def float64_gradient(workload: Workload, rival: str) -> np.ndarray:
    """Loss and gradients in one flat array."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "gradient.npz"
        worker = Worker(workload, rival, "float64", tasks=CHECKED_TASKS)
        try:
            worker.ask(f"save {file}")
        finally:
            worker.close()
        with np.load(file) as saved:
            return np.concatenate([saved[name].ravel() for name in saved.files])


# --- how long does it take? ---------------------------------------------------------------------


@dataclass(frozen=True)
class Effort:
    """How much to measure: seconds for each rival, and the least and most samples."""

    seconds: float = 10.0
    least: int = 3
    most: int = 25


QUICK = Effort(0.0, 1, 1)


@dataclass
class Contestant:
    """A rival in a race: what it answered so far.

    Attributes:
        steps: of one sample, so many that it is long enough to time.
        samples: milliseconds of a step, by round. ratios: to ours in the same round.
    """

    worker: Worker
    first_seconds: float = math.nan
    megabytes: float = math.nan
    steps: int = 1
    spent: float = 0.0
    samples: list[float] = field(default_factory=list)
    ratios: list[float] = field(default_factory=list)

    def start(self) -> None:
        first = self.worker.ask("first")
        self.first_seconds, self.megabytes = first["wall"], first["megabytes"]
        self.steps = max(1, math.ceil(0.05 / self.worker.ask("steps 1")["wall"]))
        self.spent = 0.0

    def sample(self, clock: str) -> float:
        answer = self.worker.ask(f"steps {self.steps}")
        self.spent += answer["wall"]
        self.samples.append(1e3 * answer[clock] / self.steps)
        return self.samples[-1]

    def row(self) -> dict[str, Any]:
        row = {
            "first_seconds": self.first_seconds,
            "peak_megabytes": self.megabytes,
            "milliseconds": spread(self.samples),
            "samples": len(self.samples),
        }
        return {**row, "ratio": spread(self.ratios)} if self.ratios else row


def spread(values: Sequence[float]) -> dict[str, float]:
    return {"min": min(values), "median": statistics.median(values), "max": max(values)}


def race(contestants: dict[str, Contestant], seconds: float, least: int, most: int, clock: str = "cpu") -> None:
    """Rounds in which each gives one sample, until every one has run for so long and given at least so many."""
    ours = contestants.get(OURS)
    for _ in range(most):
        running = [
            one for one in contestants.values() if one is not ours and (one.spent < seconds or len(one.samples) < least)
        ]
        if not running and (ours is None or (ours.spent >= seconds and len(ours.samples) >= least)):
            return
        base = ours.sample(clock) if ours else None
        for one in running:
            sample = one.sample(clock)
            if base is not None:
                one.ratios.append(sample / base)


def measure(workload: Workload, rivals: Iterable[str], effort: Effort, say: Callable[[str], None]) -> dict[str, Any]:
    """A row for every rival, by its name: its time, or why it has none."""
    rows: dict[str, dict[str, Any]] = {}
    reference = float64_gradient(workload, ORACLE)
    contestants: dict[str, Contestant] = {}
    try:
        for rival in rivals:
            try:
                worker = Worker(workload, rival, "float32")
                if "cannot" in worker.greeting:
                    rows[rival] = {"cannot": worker.greeting["cannot"]}
                    worker.close()
                    continue
                contestants[rival] = Contestant(worker)
                error = gradient_error(workload, rival, reference)
                rows[rival] = {"version": worker.greeting["version"], "error": error}
                contestants[rival].start()
            except WorkerError as failure:
                rows[rival] = {"failed": str(failure)}
                if rival in contestants:
                    contestants.pop(rival).worker.close()
            say(f"{workload.name}: {rival} {rows[rival]}")
        race(contestants, effort.seconds, effort.least, effort.most)
        for rival, contestant in contestants.items():
            rows[rival] |= contestant.row()
    finally:
        for contestant in contestants.values():
            contestant.worker.close()
    return rows


def measure_threads(workload: Workload, rivals: Iterable[str], effort: Effort) -> dict[str, Any]:
    """Wall clock with one thread and with two, in turns; the ratio is two threads' time to one's."""
    rows = {}
    for rival in rivals:
        pair: list[Contestant] = []
        try:
            for threads in (1, 2):
                pair.append(Contestant(Worker(workload, rival, "float32", threads)))
                pair[-1].start()
            for _ in range(effort.most):
                for one in pair:
                    one.sample("wall")
                if pair[0].spent >= effort.seconds and len(pair[0].samples) >= effort.least:
                    break
            ratios = [two / one for one, two in zip(pair[0].samples, pair[1].samples, strict=True)]
            rows[rival] = {
                "one": spread(pair[0].samples),
                "two": spread(pair[1].samples),
                "ratio": spread(ratios),
                "peak_megabytes": pair[1].megabytes,
            }
        except WorkerError as failure:
            rows[rival] = {"failed": str(failure)}
        finally:
            for one in pair:
                one.worker.close()
    return rows


# --- the command --------------------------------------------------------------------------------


def main() -> None:
    arguments = _parse(sys.argv[1:])
    workloads = [WORKLOADS[name] for name in arguments.workloads]
    effort = QUICK if arguments.quick else Effort(arguments.seconds)

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    results: dict[str, Any] = {"workloads": {}, "threads": {}}
    if arguments.output and arguments.output.exists():
        results = json.loads(arguments.output.read_text())
    results["machine"] = machine.describe()
    for workload in workloads:
        rivals = [name for name in RIVALS_OF_GROUP[workload.group] if name in arguments.rivals]
        run = {"date": datetime.now(timezone.utc).date().isoformat(), "command": shlex.join(["maml.py", *sys.argv[1:]])}
        if not arguments.only_threads:
            rows = measure(workload, rivals, effort, say)
            results["workloads"][workload.name] = {**run, "rows": rows}
            say(summary(workload, rows))
        if workload.group == "rivals" and not arguments.no_threads:
            rows = measure_threads(workload, [name for name in (OURS, "loop") if name in rivals], effort)
            results["threads"][workload.name] = {**run, "rows": rows}
            say(f"{workload.name}: two threads {rows}")
        if arguments.output:
            arguments.output.parent.mkdir(exist_ok=True)
            arguments.output.write_text(json.dumps(results, indent=1) + "\n")


def summary(workload: Workload, rows: dict[str, Any]) -> str:
    lines = [workload.title]
    for rival, row in rows.items():
        if "milliseconds" not in row:
            lines.append(f"  {RIVALS[rival].title:42} {row}")
            continue
        time, ratio = row["milliseconds"], row.get("ratio", {}).get("median", math.nan)
        lines.append(
            f"  {RIVALS[rival].title:42} {time['median']:10.3f} ms ({time['min']:.3f}–{time['max']:.3f})"
            f"  ×{ratio:.2f}  first {row['first_seconds']:.2f} s  {row['peak_megabytes']:.0f} MB"
            f"  error {row['error']:.1e}"
        )
    return "\n".join(lines)


def _parse(words: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workloads", nargs="+", default=list(WORKLOADS), choices=list(WORKLOADS), metavar="NAME")
    parser.add_argument("--rivals", nargs="+", default=list(RIVALS), choices=list(RIVALS), metavar="NAME")
    parser.add_argument("--seconds", type=float, default=Effort.seconds, help="for each rival and workload")
    parser.add_argument("--quick", action="store_true", help="one sample each: does everything run?")
    part = parser.add_mutually_exclusive_group()
    part.add_argument("--only-threads", action="store_true", help="the comparison of one and two threads alone")
    part.add_argument("--no-threads", action="store_true", help="all but that comparison")
    parser.add_argument(
        "--output", type=Path, help="JSON to write; workloads that it already holds and are not run stay in it"
    )
    arguments = parser.parse_args(words)
    if arguments.output is None and not arguments.quick:
        arguments.output = HERE / "results" / "maml.json"
    return arguments


if __name__ == "__main__":
    main()
