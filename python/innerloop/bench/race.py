"""Rivals that are compared and take turns.

First every rival's answer is compared, in float64, with an oracle's; one that differs is marked and its time does not
count. Then all of them, each a process of its own, take turns at a workload, float32: one sample each in a round, so
that whatever else the machine does meets all alike. CPU time and wall clock; ratios are taken within rounds.
"""

from __future__ import annotations

import json
import math
import os
import pickle
import statistics
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from innerloop.bench.rivals import Order, Rival

EXACT = 1e-9
#: Tasks of the comparison in float64: enough to see every term, few enough for the slow.
CHECKED_TASKS = 2

#: A dataclass with a name, a title and a number of tasks, which the rivals' make knows: Workload, or another.
AnyWorkload = Any
Clock = Literal["cpu", "wall"]
Say = Callable[[str], None]
#: What was found, by the rival's name.
Rows = dict[str, dict[str, Any]]


class WorkerError(RuntimeError):
    """Why a rival has no result: it says that it cannot, or the last line of its error."""


class Worker:
    """A process of worker.py, and the words exchanged with it."""

    def __init__(
        self, workload: AnyWorkload, rival: Rival, dtype: str, threads: int = 1, tasks: int | None = None
    ) -> None:
        """tasks: of the workload's, so many at most."""
        python = Path(sys.executable) if rival.environment is None else rival.environment / "bin" / "python"
        if not python.exists():
            raise WorkerError("has no environment: benchmarks/peers.sh makes it")
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed in __exit__)
        self._process = subprocess.Popen(
            [python, "-m", "innerloop.bench.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join(_import_folders()),
                **dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(threads)),
                "NPROC": str(threads),  # the size of XLA's pool
                "XLA_FLAGS": f"--xla_cpu_multi_thread_eigen={'true' if threads > 1 else 'false'}",
                "JAX_PLATFORMS": "cpu",
                "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1",  # a first call is a first call
            },
        )
        if tasks is not None:
            workload = replace(workload, tasks=min(workload.tasks, tasks))
        self._send(pickle.dumps(Order(rival, workload, dtype, threads)))

    def __enter__(self) -> Worker:
        try:
            self.version = self._read()["version"]
        except WorkerError:
            self.__exit__()
            raise
        return self

    def ask(self, request: str) -> dict[str, float]:
        return ask_at_once([self], request)[0]

    def _send(self, message: bytes) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(message)
        self._process.stdin.flush()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if line:
            answer: dict[str, Any] = json.loads(line)
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


def _import_folders() -> list[str]:
    """Where this process finds modules, but for its site-packages: those of another environment come before them."""
    installed = {sysconfig.get_path(kind) for kind in ("purelib", "platlib")}
    return [folder for folder in sys.path if folder and folder not in installed]


def ask_at_once(workers: Sequence[Worker], request: str) -> list[dict[str, float]]:
    """The answers of workers that were at it at the same time."""
    for worker in workers:
        worker._send(f"{request}\n".encode())
    return [worker._read() for worker in workers]


# --- is it the same gradient? -------------------------------------------------------------------


def check(workload: AnyWorkload, rivals: Mapping[str, Rival], oracle: Rival, say: Say) -> Rows:
    """For every rival ‖g − reference‖ / ‖reference‖ of the loss or of all gradients, whichever is larger,
    in float64, and whether that makes it exact."""
    rows: Rows = {}
    reference = _in_float64(workload, oracle)
    for name, rival in rivals.items():
        try:
            found = reference if rival is oracle else _in_float64(workload, rival)
            error = max(
                float(np.linalg.norm(mine - theirs) / np.linalg.norm(theirs))
                for mine, theirs in zip(found, reference, strict=True)
            )
            rows[name] = {"error": error, "exact": error <= EXACT}
        except WorkerError as failure:
            rows[name] = {"failed": str(failure)}
        say(f"{workload.name}: {name} {rows[name]}")
    return rows


def _in_float64(workload: AnyWorkload, rival: Rival) -> tuple[np.ndarray, np.ndarray]:
    """The loss, and all gradients in one flat array."""
    with tempfile.TemporaryDirectory() as folder, Worker(workload, rival, "float64", tasks=CHECKED_TASKS) as worker:
        file = Path(folder) / "step.npz"
        worker.ask(f"save {file}")
        with np.load(file) as saved:
            loss, *gradients = (saved[name].ravel() for name in saved.files)
            return loss, np.concatenate(gradients)


# --- how long does it take? ---------------------------------------------------------------------


@dataclass(frozen=True)
class Effort:
    """How much to measure: seconds for each rival, the least and most samples, and of how many tasks at most."""

    seconds: float = 10.0
    least: int = 3
    most: int = 25
    tasks: int | None = None


@dataclass
class Contestant:
    """A rival in a race: what it answered so far.

    Attributes:
        clock: of the ratios. steps: of one sample, so many that it is long enough to time.
        samples: milliseconds of a step, by round, of both clocks. ratios: to the base's in the same round.
    """

    worker: Worker
    clock: Clock = "cpu"
    first_seconds: float = math.nan
    megabytes: float = math.nan
    steps: int = 1
    spent: float = 0.0
    samples: dict[Clock, list[float]] = field(default_factory=lambda: {"cpu": [], "wall": []})
    ratios: list[float] = field(default_factory=list)
    failure: str = ""

    def start(self, seconds: float = 0.05) -> None:
        """seconds: of one sample, at least."""
        first = self.worker.ask("first")
        self.first_seconds, self.megabytes = first["wall"], first["megabytes"]
        if self.first_seconds < 1:  # else one step is long enough, and another would be lost
            self.steps = max(1, math.ceil(seconds / self.worker.ask("steps 1")["wall"]))

    def wants_more(self, effort: Effort) -> bool:
        return not self.failure and (self.spent < effort.seconds or len(self.samples["cpu"]) < effort.least)

    def sample(self) -> float:
        answer = self.worker.ask(f"steps {self.steps}")
        self.spent += answer["wall"]
        for clock, samples in self.samples.items():
            samples.append(1e3 * answer[clock] / self.steps)
        return self.samples[self.clock][-1]

    def row(self) -> dict[str, Any]:
        if self.failure:
            return {"failed": self.failure}
        row = {
            "first_seconds": self.first_seconds,
            "peak_megabytes": self.megabytes,
            "milliseconds": spread(self.samples[self.clock]),
            "wall_milliseconds": spread(self.samples["wall"]),
            "samples": len(self.samples["cpu"]),
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


def measure(
    workload: AnyWorkload, rivals: Mapping[str, Rival], base: str, effort: Effort, say: Say, threads: int = 1
) -> Rows:
    """For every rival its time and its ratio to the base's, or why it has none: CPU time; with threads, wall clock."""
    clock: Clock = "cpu" if threads == 1 else "wall"
    rows: Rows = {}
    contestants: dict[str, Contestant] = {}
    with ExitStack() as workers:
        for name, rival in rivals.items():
            try:
                worker = workers.enter_context(Worker(workload, rival, "float32", threads, effort.tasks))
                contestant = Contestant(worker, clock)
                contestant.start()
                contestants[name] = contestant
                rows[name] = {"version": worker.version}
            except WorkerError as failure:
                rows[name] = {"failed": str(failure)}
            say(f"{workload.name}: {name} is ready")
        race(contestants, base, effort)
        for name, contestant in contestants.items():
            rows[name] |= contestant.row()
    return rows


def measure_threads(workload: AnyWorkload, rivals: Mapping[str, Rival], effort: Effort) -> Rows:
    """Wall clock with one thread and with two, in turns; the ratio is two threads' time to one's, and the floor the
    least that it could be."""
    rows: Rows = {}
    for name, rival in rivals.items():
        try:
            with (
                Worker(workload, rival, "float32", 1, effort.tasks) as one,
                Worker(workload, rival, "float32", 2, effort.tasks) as two,
                Worker(workload, rival, "float32", 1, effort.tasks) as other,
            ):
                pair = {"one": Contestant(one, "wall"), "two": Contestant(two, "wall")}
                second = Contestant(other, "wall")
                # While the other has its turn, a second thread falls asleep; it takes milliseconds back to a core.
                for contestant in (*pair.values(), second):
                    contestant.start(seconds=0.5)
                race(pair, "one", effort)
                row = {"one": spread(pair["one"].samples["wall"]), **pair["two"].row()}
                rounds = len(pair["one"].samples["wall"])
                rows[name] = {**row, "floor": spread([_floor(pair["one"], second) for _ in range(rounds)])}
        except WorkerError as failure:
            rows[name] = {"failed": str(failure)}
    return rows


def _floor(one: Contestant, other: Contestant) -> float:
    """What two cores are worth, as they may share memory and frequency: half the time of two processes at once, of one
    thread each, to that of one of them alone."""
    alone = one.sample()
    both = ask_at_once([one.worker, other.worker], f"steps {one.steps}")
    return 1e3 * statistics.mean(answer["wall"] for answer in both) / one.steps / alone / 2


def summary(workload: AnyWorkload, rivals: Mapping[str, Rival], rows: Rows) -> str:
    lines = [workload.title]
    for rival, row in rows.items():
        if "failed" in row:
            lines.append(f"  {rivals[rival].title:40} {row['failed']}")
            continue
        time, ratio = row["milliseconds"], f"×{row['ratio']['median']:.2f}" if "ratio" in row else ""
        lines.append(
            f"  {rivals[rival].title:40} {time['median']:10.3f} ms ({time['min']:.3f}–{time['max']:.3f})"
            f"  {ratio:8}  first {row['first_seconds']:.2f} s  {row['peak_megabytes']:.0f} MB"
        )
    return "\n".join(lines)
