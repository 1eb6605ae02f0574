"""Rivals that are compared and take turns: what maml.py and heads.py share.

First every rival's answer is compared, in float64, with an oracle's; one that differs is marked and its time does not
count. Then all of them, each a process of its own, take turns at a workload, float32: one sample each in a round, so
that whatever else the machine does meets all alike. Ratios are taken within rounds.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from head_workloads import HeadWorkload
from rivals import ALL_RIVALS
from workloads import Workload

HERE = Path(__file__).parent
PEERS = HERE.parent / ".cache" / "peers"

EXACT = 1e-9
#: Tasks of the comparison in float64: enough to see every term, few enough for the slow.
CHECKED_TASKS = 2

AnyWorkload = Workload | HeadWorkload
Rows = dict[str, dict[str, Any]]


class WorkerError(RuntimeError):
    """Why a rival has no result: it says that it cannot, or the last line of its error."""


class Worker:
    """A process of worker.py, and the words exchanged with it."""

    def __init__(
        self, workload: AnyWorkload, rival: str, dtype: str, threads: int = 1, tasks: int | None = None
    ) -> None:
        count = str(threads)
        peer = ALL_RIVALS[rival].peer
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


def check(workload: AnyWorkload, rivals: Iterable[str], oracle: str, say: Callable[[str], None]) -> Rows:
    """For every rival, by its name, ‖g − reference‖ / ‖reference‖ of the loss or of all gradients, whichever is larger,
    in float64, and whether that makes it exact."""
    rows: Rows = {}
    reference = _in_float64(workload, oracle)
    for rival in rivals:
        try:
            found = _in_float64(workload, rival)
            error = max(
                float(np.linalg.norm(mine - theirs) / np.linalg.norm(theirs))
                for mine, theirs in zip(found, reference, strict=True)
            )
            rows[rival] = {"error": error, "exact": error <= EXACT}
        except WorkerError as failure:
            rows[rival] = {"failed": str(failure)}
        say(f"{workload.name}: {rival} {rows[rival]}")
    return rows


def _in_float64(workload: AnyWorkload, rival: str) -> tuple[np.ndarray, np.ndarray]:
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
        if self.first_seconds < 1:  # else one step is long enough, and another would be lost
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


def measure(
    workload: AnyWorkload, rivals: Iterable[str], base: str, effort: Effort, say: Callable[[str], None]
) -> Rows:
    """For every rival, by its name, its time and its ratio to the base's, or why it has none."""
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
        race(contestants, base, effort)
        for rival, contestant in contestants.items():
            rows[rival] |= contestant.row()
    return rows


def summary(workload: AnyWorkload, rows: Rows) -> str:
    lines = [workload.title]
    for rival, row in rows.items():
        if "failed" in row:
            lines.append(f"  {ALL_RIVALS[rival].title:40} {row['failed']}")
            continue
        time, ratio = row["milliseconds"], row.get("ratio", {}).get("median", math.nan)
        lines.append(
            f"  {ALL_RIVALS[rival].title:40} {time['median']:10.3f} ms ({time['min']:.3f}–{time['max']:.3f})"
            f"  ×{ratio:.2f}  first {row['first_seconds']:.2f} s  {row['peak_megabytes']:.0f} MB"
        )
    return "\n".join(lines)
