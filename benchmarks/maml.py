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
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal

import numpy as np

import machine
from innerloop.lowering import lower
from rivals import OURS, RIVALS
from workloads import WORKLOADS, Workload, make_model

HERE = Path(__file__).parent
PEERS = HERE.parent / ".cache" / "peers"

ORACLE = "innerloop-torch"
EXACT = 1e-9
#: Tasks of the comparison in float64: enough to see every term, few enough for the slow.
CHECKED_TASKS = 2
PARTS = ("check", "race", "threads")

RIVALS_OF_GROUP = {
    "rivals": list(RIVALS),
    "tasks": [OURS, "innerloop-op", ORACLE, "loop", "jax-vmap", "jax-loop"],
    "torch": [OURS, "innerloop-op", ORACLE],
}


Rows = dict[str, dict[str, Any]]


class WorkerError(RuntimeError):
    """Why a rival has no result: it says that it cannot, or the last line of its error."""


class Worker:
    """A process of worker.py, and the words exchanged with it."""

    def __init__(self, workload: Workload, rival: str, dtype: str, threads: int = 1, tasks: int | None = None) -> None:
        count = str(threads)
        peer = RIVALS[rival].peer
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed in __exit__)
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

    def __enter__(self) -> Worker:
        try:
            self.version = self._read()["version"]
        except WorkerError:
            self.__exit__()
            raise
        return self

    def ask(self, request: str) -> dict[str, float]:
        assert self._process.stdin is not None
        self._process.stdin.write(request + "\n")
        self._process.stdin.flush()
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if line:
            answer = json.loads(line)
            if "cannot" in answer:
                raise WorkerError(answer["cannot"])
            return answer
        status = self._process.wait()
        self._errors.seek(0)
        last = [text for text in self._errors.read().splitlines() if text.strip()][-1:]
        raise WorkerError(f"fails: {last[0].strip()}" if last else f"ends with status {status}")

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()
        self._errors.close()


# --- is it the same gradient? -------------------------------------------------------------------


def check(workload: Workload, rivals: Iterable[str], say: Callable[[str], None]) -> Rows:
    """For every rival, by its name, ‖g − reference‖ / ‖reference‖ over the meta-loss and the gradients of all
    parameters, float64, and whether that makes it exact."""
    rows: Rows = {}
    reference = _float64_gradient(workload, ORACLE)
    for rival in rivals:
        try:
            gradient = _float64_gradient(workload, rival)
            error = float(np.linalg.norm(gradient - reference) / np.linalg.norm(reference))
            rows[rival] = {"error": error, "exact": error <= EXACT}
        except WorkerError as failure:
            rows[rival] = {"failed": str(failure)}
        say(f"{workload.name}: {rival} {rows[rival]}")
    return rows


def _float64_gradient(workload: Workload, rival: str) -> np.ndarray:
    """Loss and gradients in one flat array."""
    with tempfile.TemporaryDirectory() as folder, Worker(workload, rival, "float64", tasks=CHECKED_TASKS) as worker:
        file = Path(folder) / "gradient.npz"
        worker.ask(f"save {file}")
        with np.load(file) as saved:
            return np.concatenate([saved[name].ravel() for name in saved.files])


# --- how long does it take? ---------------------------------------------------------------------


@dataclass(frozen=True)
class Effort:
    """How much to measure: seconds for each rival, the least and most samples, and of how many tasks at most."""

    seconds: float = 10.0
    least: int = 3
    most: int = 25
    tasks: int | None = None


QUICK = Effort(0.0, 1, 1, CHECKED_TASKS)


@dataclass
class Contestant:
    """A rival in a race: what it answered so far.

    Attributes:
        steps: of one sample, so many that it is long enough to time.
        samples: milliseconds of a step, by round. ratios: to ours in the same round.
    """

    worker: Worker
    clock: Literal["cpu", "wall"] = "cpu"
    first_seconds: float = math.nan
    megabytes: float = math.nan
    steps: int = 1
    spent: float = 0.0
    samples: list[float] = field(default_factory=list)
    ratios: list[float] = field(default_factory=list)
    failure: str = ""

    def start(self) -> None:
        first = self.worker.ask("first")
        self.first_seconds, self.megabytes = first["wall"], first["megabytes"]
        self.steps = max(1, math.ceil(0.05 / self.worker.ask("steps 1")["wall"]))

    def wants_more(self, effort: Effort) -> bool:
        return not self.failure and (self.spent < effort.seconds or len(self.samples) < effort.least)

    def sample(self) -> float:
        answer = self.worker.ask(f"steps {self.steps}")
        self.spent += answer["wall"]
        self.samples.append(1e3 * answer[self.clock] / self.steps)
        return self.samples[-1]

    def row(self) -> dict[str, Any]:
        if self.failure:
            return {"failed": self.failure}
        row = {
            "first_seconds": self.first_seconds,
            "peak_megabytes": self.megabytes,
            "milliseconds": spread(self.samples),
            "samples": len(self.samples),
        }
        return {**row, "ratio": spread(self.ratios)} if self.ratios else row


def spread(values: Sequence[float]) -> dict[str, float]:
    return {"min": min(values), "median": statistics.median(values), "max": max(values)}


def race(contestants: Mapping[str, Contestant], base: str, effort: Effort) -> None:
    """Rounds in which each gives one sample, until all have given enough; the base goes on to the end."""
    first = contestants.get(base)
    for _ in range(effort.most):
        running = [one for one in contestants.values() if one.wants_more(effort)]
        if not running:
            return
        time_of_base = first.sample() if first else None
        for one in running:
            if one is first:
                continue
            try:
                time = one.sample()
            except WorkerError as failure:  # out of memory, say: the others go on
                one.failure = str(failure)
                continue
            if time_of_base is not None:
                one.ratios.append(time / time_of_base)


def measure(workload: Workload, rivals: Iterable[str], effort: Effort, say: Callable[[str], None]) -> Rows:
    """For every rival, by its name, its time, or why it has none."""
    rows: Rows = {}
    contestants: dict[str, Contestant] = {}
    with ExitStack() as workers:
        for rival in rivals:
            try:
                worker = workers.enter_context(Worker(workload, rival, "float32", tasks=effort.tasks))
                contestant = Contestant(worker)
                contestant.start()
                contestants[rival] = contestant
                rows[rival] = {"version": worker.version}
            except WorkerError as failure:
                rows[rival] = {"failed": str(failure)}
            say(f"{workload.name}: {rival} is ready")
        race(contestants, OURS, effort)
        for rival, contestant in contestants.items():
            rows[rival] |= contestant.row()
    return rows


def measure_threads(workload: Workload, rivals: Iterable[str], effort: Effort) -> Rows:
    """Wall clock with one thread and with two, in turns; the ratio is two threads' time to one's."""
    rows: Rows = {}
    for rival in rivals:
        try:
            with (
                Worker(workload, rival, "float32", 1, effort.tasks) as one,
                Worker(workload, rival, "float32", 2, effort.tasks) as two,
            ):
                pair = {"one": Contestant(one, clock="wall"), "two": Contestant(two, clock="wall")}
                for contestant in pair.values():
                    contestant.start()
                race(pair, "one", effort)
            rows[rival] = {"one": spread(pair["one"].samples), **pair["two"].row()}
        except WorkerError as failure:
            rows[rival] = {"failed": str(failure)}
    return rows


# --- the command --------------------------------------------------------------------------------


def main() -> None:
    arguments = _parse(sys.argv[1:])
    effort = QUICK if arguments.quick else Effort(arguments.seconds)

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    results: dict[str, Any] = {"checks": {}, "races": {}, "threads": {}}
    if arguments.output and arguments.output.exists():
        results = json.loads(arguments.output.read_text())
    results["machine"] = machine.describe()
    run = {"date": datetime.now(timezone.utc).date().isoformat(), "command": shlex.join(["maml.py", *sys.argv[1:]])}
    for workload in (WORKLOADS[name] for name in arguments.workloads):
        rivals = [name for name in RIVALS_OF_GROUP[workload.group] if name in arguments.rivals]
        if "check" in arguments.parts and workload.group != "tasks":
            results["checks"].setdefault(workload.name, {}).update(check(workload, rivals, say))
        if "race" in arguments.parts:
            rows = measure(workload, rivals, effort, say)
            results["races"][workload.name] = {**run, "flops": flops(workload), "rows": rows}
            say(summary(workload, rows))
        if "threads" in arguments.parts and workload.group == "rivals":
            rows = measure_threads(workload, [name for name in (OURS, "loop") if name in rivals], effort)
            results["threads"][workload.name] = {**run, "rows": rows}
            say(f"{workload.name}: two threads {rows}")
        if arguments.output:
            arguments.output.parent.mkdir(exist_ok=True)
            arguments.output.write_text(json.dumps(results, indent=1) + "\n")


def flops(workload: Workload) -> int | None:
    """Of the products and convolutions of a step; None where Program.cost() does not say."""
    if workload.adapt != "all":
        return None
    cost = lower(make_model(workload, "float32")).cost(
        workload.sample, workload.support, workload.query, workload.steps, workload.first_order
    )
    return cost.flops * workload.tasks


def summary(workload: Workload, rows: Rows) -> str:
    lines = [workload.title]
    for rival, row in rows.items():
        if "failed" in row:
            lines.append(f"  {RIVALS[rival].title:40} {row['failed']}")
            continue
        time, ratio = row["milliseconds"], row.get("ratio", {}).get("median", math.nan)
        lines.append(
            f"  {RIVALS[rival].title:40} {time['median']:10.3f} ms ({time['min']:.3f}–{time['max']:.3f})"
            f"  ×{ratio:.2f}  first {row['first_seconds']:.2f} s  {row['peak_megabytes']:.0f} MB"
        )
    return "\n".join(lines)


def _parse(words: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workloads", nargs="+", default=list(WORKLOADS), choices=list(WORKLOADS), metavar="NAME")
    parser.add_argument("--rivals", nargs="+", default=list(RIVALS), choices=list(RIVALS), metavar="NAME")
    parser.add_argument("--seconds", type=float, default=Effort.seconds, help="for each rival and workload")
    parser.add_argument("--quick", action="store_true", help="two tasks, one sample: does everything run?")
    parser.add_argument(
        "--parts", nargs="+", default=PARTS, choices=PARTS, help="gradients in float64, the race, two threads"
    )
    parser.add_argument(
        "--output", type=Path, help="JSON to write; workloads that it already holds and are not run stay in it"
    )
    arguments = parser.parse_args(words)
    if arguments.output is None and not arguments.quick:
        arguments.output = HERE / "results" / "maml.json"
    return arguments


if __name__ == "__main__":
    main()
