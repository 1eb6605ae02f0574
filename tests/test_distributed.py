"""Several processes: the same training and evaluation as one process on the same tasks."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.multiprocessing import spawn

import processes
from innerloop.checkpoint import previous_of
from innerloop.training import BEST, LATEST, METRICS, read_metrics


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where two processes have left what they found."""
    folder = tmp_path_factory.mktemp("processes")
    spawn(processes.run_all, (folder,), nprocs=processes.SIZE)
    return folder


@pytest.fixture(scope="module")
def found(folder: Path) -> list[dict[str, Any]]:
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(processes.SIZE)]


def assert_same_training(one: dict[str, Any], other: dict[str, Any]) -> None:
    for name in ("parameters", "losses"):
        assert one[name] == pytest.approx(other[name], rel=1e-12, abs=1e-12)
    means = [[record["mean"] for record in side["validations"]] for side in (one, other)]
    assert means[0] == pytest.approx(means[1], rel=1e-12)


@pytest.mark.parametrize("name", processes.ALGORITHMS)
def test_training_is_that_of_one_process(name: str, found: list[dict[str, Any]]) -> None:
    alone = processes.train(name)
    for process in found:
        assert_same_training(process[name], alone)
    assert found[0][name]["parameters"] == found[1][name]["parameters"]  # the processes agree to the last bit


def test_a_batch_of_fewer_tasks_than_processes(found: list[dict[str, Any]]) -> None:
    alone = processes.train_on_batches()
    for process in found:
        assert_same_training(process["on batches"], alone)


def test_the_first_process_alone_writes(folder: Path, found: list[dict[str, Any]]) -> None:
    names = [BEST, LATEST, METRICS, previous_of(Path(BEST)).name, previous_of(Path(LATEST)).name]
    assert sorted(path.name for path in (folder / "run").iterdir()) == sorted(names)
    steps = [record["step"] for record in read_metrics(folder / "run") if "validation" not in record]
    assert steps == list(range(1, processes.SETTINGS.steps + 1))
    assert found[0]["in a folder"] == found[0]["maml"]


def test_evaluation_is_exactly_that_of_one_process(found: list[dict[str, Any]]) -> None:
    alone = processes.evaluate()
    assert found[0]["evaluate"] == found[1]["evaluate"] == alone


def test_ddp_around_an_algorithm(found: list[dict[str, Any]]) -> None:
    alone = processes.gradient_by_ddp()
    for process in found:
        assert process["ddp"] == pytest.approx(alone, rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("call", ["maml_loss", "algorithm"])
def test_ddp_around_a_model_is_refused(call: str, found: list[dict[str, Any]]) -> None:
    assert "model is a DistributedDataParallel" in found[0]["refusals"][call]


def test_all_processes_name_the_task_that_is_not_finite(found: list[dict[str, Any]]) -> None:
    for process in found:
        assert "step 0: task 3 of the batch has the loss nan" in process["nan"]


def test_an_interrupt_of_one_process_stops_all_after_the_same_step(found: list[dict[str, Any]]) -> None:
    for process in found:
        assert process["interrupted"]["interrupted"]
        assert len(process["interrupted"]["losses"]) == 2


def test_resuming_gives_every_process_the_checkpoint(found: list[dict[str, Any]]) -> None:
    for process in found:
        assert process["resumed"]["parameters"] == found[0]["maml"]["parameters"]


# --- the command line -----------------------------------------------------------------------------


def torchrun(run: Path) -> list[str]:
    training = "train maml --data sinusoid --steps 600 --meta-batch-size 5 --validate-every 20 --validation-episodes 20"
    return [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--max-restarts=2", "--standalone",
        "-m", "innerloop", *training.split(), "--inner-lr", "0.01", "--episodes", "30", "--run-folder", str(run),
    ]  # fmt: skip


@pytest.mark.slow
def test_a_killed_worker_is_restarted_and_ends_with_the_same_parameters(tmp_path: Path) -> None:
    subprocess.run(torchrun(tmp_path / "undisturbed"), check=True, capture_output=True)
    run = tmp_path / "disturbed"
    process = subprocess.Popen(torchrun(run), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    victim = _wait_for_worker(process.pid, run)
    os.kill(victim, signal.SIGKILL)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    assert "exitcode: -9" in output
    ends = [load_file(folder / LATEST) for folder in (tmp_path / "undisturbed", run)]
    for name in ends[0]:
        assert torch.equal(ends[0][name], ends[1][name]), name
    assert (run / "test.json").read_text() == (tmp_path / "undisturbed" / "test.json").read_text()


def _wait_for_worker(launcher: int, run: Path) -> int:
    """A worker's process, once training has come to its first checkpoint beyond the beginning."""
    deadline = time.monotonic() + 120
    while not (run / METRICS).exists() or not (run / METRICS).read_text():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    return int(children[-1])
