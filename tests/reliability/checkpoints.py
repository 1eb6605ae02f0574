"""Training that is killed, runs out of disk, or finds its checkpoint damaged: nothing is lost, nothing silently wrong.

The training is that of dying_process.py: 6 steps with dropout, a validation after every third.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file

from dying_process import build, train, train_and_die
from innerloop.checkpoint import CheckpointError, load_checkpoint, previous_of
from innerloop.training import BEST, LATEST, METRICS

Failures = list[str]

OPERATIONS = 24  # on files, in one training


def kills(count: int, seed: int = 0) -> Failures:
    """Kill training that many times, at a random moment or in a random operation on files, a write in its middle; each
    time look at what is left and go on from it. A run that comes to its end is that of an undisturbed one."""
    failures: Failures = []
    chance = random.Random(seed)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch._dynamo", "innerloop.algorithms.maml", "reliability.checkpoints"])
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        undisturbed, seconds = _undisturbed(folder)
        killed = run_number = 0
        best = float("inf")
        run = folder / "0"
        while killed < count:
            in_operation = chance.random() < 0.5
            if in_operation:
                process = context.Process(target=train_and_die, args=(run, chance.randint(1, OPERATIONS)))
                process.start()
                process.join(120)
            else:
                process = context.Process(target=train, args=(run,))
                process.start()
                process.join(chance.uniform(0, 2 * seconds))
                process.kill()
                process.join(120)
            what = f"kill {killed} of seed {seed}, run {run_number}"
            if process.exitcode == -signal.SIGKILL:
                killed += 1
                best = _look_after(run, best, failures, what)
            elif process.exitcode == 0:
                failures += [f"{what}: {difference}" for difference in differences(run, undisturbed)]
                run_number, best = run_number + 1, float("inf")
                run = folder / str(run_number)
            else:
                failures.append(f"{what}: training ended with {process.exitcode}")
                return failures
        train(run)
        failures += [f"the last run: {difference}" for difference in differences(run, undisturbed)]
    return failures


def _undisturbed(folder: Path) -> tuple[Path, float]:
    """(a run folder, the seconds that it took)."""
    train(folder / "warm", resume=False)
    start = time.perf_counter()
    train(folder / "undisturbed", resume=False)
    return folder / "undisturbed", time.perf_counter() - start


def _look_after(run: Path, best: float, failures: Failures, what: str) -> float:
    """Both checkpoints are whole; the best one is as good as before, or better. Returns its mean."""
    for name in (LATEST, BEST):
        if not (run / name).exists():
            if name == BEST and best < float("inf"):
                failures.append(f"{what}: {name} is gone")
            continue
        try:
            state = load_checkpoint(run / name, build())
        except CheckpointError as error:
            failures.append(f"{what}: {error}")
            continue
        if name == BEST:
            if state["mean"] > best:
                failures.append(f"{what}: {name} is worse than before")
            best = state["mean"]
    return best


def differences(run: Path, other: Path) -> Iterator[str]:
    """In which bits of checkpoints and metrics two runs differ."""
    for name in (LATEST, BEST):
        tensors, others = load_file(run / name), load_file(other / name)
        if tensors.keys() != others.keys() or not all(torch.equal(tensors[key], others[key]) for key in tensors):
            yield f"{name} is not that of an undisturbed run"
    if (run / METRICS).read_text() != (other / METRICS).read_text():
        yield f"{METRICS} is not that of an undisturbed run"


def full_disk(count: int, seed: int = 0) -> Failures:
    """Train on a disk with so little room that a write fails, make room and go on.

    Raises:
        PermissionError: no small disk can be made here.
    """
    failures: Failures = []
    chance = random.Random(seed)
    with tempfile.TemporaryDirectory() as name, _small_disk(Path(name) / "disk") as disk:
        undisturbed, _ = _undisturbed(Path(name))
        needed = sum(path.stat().st_size for path in undisturbed.iterdir()) + (24 << 10)
        failed = 0
        for number in range(20 * count):
            if failed == count:
                break
            run, filler = disk / "run", disk / "filler"
            room = shutil.disk_usage(disk).free - chance.randrange(0, needed, 4096)
            filler.write_bytes(b"x" * max(room, 0))
            full = False
            try:
                train(run)
            except OSError:
                full = True
            what = f"disk {number} of seed {seed}"
            failed += full
            if full:
                _look_after(run, float("inf"), failures, what)
            filler.unlink()
            if (run / LATEST).exists() or not full:
                train(run)
                failures += [f"{what}: {difference}" for difference in differences(run, undisturbed)]
            shutil.rmtree(run, ignore_errors=True)
        if failed < count:
            failures.append(f"the disk was full {failed} times only, {count} were wanted")
    return failures


@contextlib.contextmanager
def _small_disk(folder: Path) -> Iterator[Path]:
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if os.getuid() != 0 or subprocess.run(command, capture_output=True).returncode != 0:
        raise PermissionError("mounting a tmpfs needs root")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def damage(count: int, seed: int = 0) -> Failures:
    """Flip bits in a finished run's checkpoint, or cut it: it is refused by name and the one before it offered, from
    which the run comes to the same end; or, where the header's padding was hit, it is read as it was."""
    failures: Failures = []
    chance = random.Random(seed)
    with tempfile.TemporaryDirectory() as name:
        undisturbed, _ = _undisturbed(Path(name))
        sound = load_file(undisturbed / LATEST)
        for number in range(count):
            run = Path(name) / "damaged"
            shutil.copytree(undisturbed, run)
            what = f"damage {number} of seed {seed}"
            latest = run / LATEST
            content = bytearray(latest.read_bytes())
            if chance.random() < 0.3:
                del content[chance.randrange(len(content)) :]
            for _ in range(chance.choice([0, 1, 1, 1, 8]) if len(content) == latest.stat().st_size else 0):
                content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
            latest.write_bytes(content)
            try:
                train(run)
            except CheckpointError as error:
                if str(latest) not in str(error) or str(previous_of(latest)) not in str(error):
                    failures.append(f"{what}: the refusal names no file, or offers none: {error}")
                elif number % 5 == 0:
                    previous_of(latest).rename(latest)
                    train(run)
                    failures += [f"{what}: {difference}" for difference in differences(run, undisturbed)]
            except Exception as error:
                failures.append(f"{what}: {type(error).__name__}: {error}")
            else:
                if any(not torch.equal(value, sound[key]) for key, value in load_file(latest).items()):
                    failures.append(f"{what}: was read, and is not what was written")
            shutil.rmtree(run)
    return failures
