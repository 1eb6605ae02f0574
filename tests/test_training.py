"""Meta-training: what it accepts, what it leaves, and that nothing which interrupts it changes its result."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import innerloop
import innerloop.checkpoint
import innerloop.runs
from dying_process import SETTINGS, build, train, train_and_die
from innerloop import TaskBatch
from innerloop.checkpoint import CheckpointError
from innerloop.models import SimpleModel
from innerloop.training import (
    BEST,
    LATEST,
    METRICS,
    NonFiniteLossError,
    TrainingSettings,
    cpu_threads,
    fit,
    read_metrics,
)


def sinusoids(batches: int, tasks: int = 3) -> list[TaskBatch]:
    data = innerloop.data.get("sinusoid")
    return [data.sample(tasks, 1, 5, 5, seed=0, first_task=tasks * number) for number in range(batches)]


def parameters(algorithm: nn.Module) -> torch.Tensor:
    return nn.utils.parameters_to_vector(algorithm.parameters()).detach().clone()


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Small tensors gain nothing from a second one, and wait for it on a busy machine."""
    with cpu_threads(1):
        yield


# --- what is trained on ---------------------------------------------------------------------------


def test_a_users_list_of_task_batches_with_the_simple_model() -> None:
    data = innerloop.data.get("glyphs").split("train")
    tasks = [data.sample(8, ways=5, shots=1, queries=5, seed=0, first_task=8 * number) for number in range(25)]
    torch.manual_seed(0)
    algorithm = innerloop.get("maml")(SimpleModel(784, 128, 5), inner_lr=0.4, inner_steps=1)
    before = innerloop.evaluate(algorithm, tasks).mean
    history = fit(algorithm, tasks)  # one pass
    assert [record["step"] for record in history.steps] == list(range(1, 26))
    assert innerloop.evaluate(algorithm, tasks).mean > before + 0.05


def test_an_iterable_is_gone_through_until_the_steps_are_done() -> None:
    batches = sinusoids(3)
    seen = []

    class Loader:
        def __iter__(self) -> Iterator[TaskBatch]:
            for number, batch in enumerate(batches):
                seen.append(number)
                yield batch

    fit(build(), Loader(), settings=TrainingSettings(steps=7))
    assert seen == [0, 1, 2, 0, 1, 2, 0]


@pytest.mark.parametrize("tasks", [iter(()), (batch for batch in sinusoids(2))], ids=["empty", "generator"])
def test_an_iterable_that_ends_too_early(tasks: Iterator[TaskBatch]) -> None:
    with pytest.raises(ValueError, match="without a batch, or one that cannot be gone through twice"):
        fit(build(), tasks, settings=TrainingSettings(steps=5))


def test_a_data_set_gives_every_step_its_own_tasks() -> None:
    seen = []
    algorithm = build()
    algorithm.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].support_x))
    fit(algorithm, innerloop.data.get("sinusoid").split("train"), settings=replace(SETTINGS, steps=3))
    assert [len(x) for x in seen] == [SETTINGS.meta_batch_size] * 3
    assert len({float(x[0, 0]) for batch in seen for x in batch}) == 9


# --- a step -----------------------------------------------------------------------------------------


def test_one_step_is_the_clipped_gradient_in_the_users_optimizer() -> None:
    tasks = sinusoids(1)
    algorithm, twin = build().eval(), build().eval()
    algorithm.train = lambda mode=True: algorithm  # without dropout both take the same step
    optimizer = torch.optim.SGD(algorithm.parameters(), lr=0.1)
    fit(algorithm, tasks, settings=TrainingSettings(steps=1, clip=0.5), optimizer=optimizer)
    gradients = torch.autograd.grad(twin(tasks[0]).loss, list(twin.parameters()))
    norm = torch.cat([gradient.flatten() for gradient in gradients]).norm()
    assert norm > 0.5
    for moved, start, gradient in zip(algorithm.parameters(), twin.parameters(), gradients, strict=True):
        torch.testing.assert_close(moved, start - 0.1 * gradient * (0.5 / norm))


def test_the_cosine_schedule_starts_at_the_rate_and_ends_near_zero() -> None:
    algorithm = build()
    optimizer = torch.optim.SGD(algorithm.parameters(), lr=0.2)
    rates = []
    settings = TrainingSettings(steps=4, schedule="cosine")
    fit(
        algorithm,
        sinusoids(4),
        settings=settings,
        optimizer=optimizer,
        progress=lambda done, result: rates.append(optimizer.param_groups[0]["lr"]),
    )
    assert rates == pytest.approx([0.2 * 0.5 * (1 + math.cos(math.pi * step / 4)) for step in range(4)])


def test_a_loss_that_is_no_number_names_step_and_task() -> None:
    batches = sinusoids(3)
    batches[2].query_y[1, 0] = torch.nan
    algorithm = build()
    with pytest.raises(NonFiniteLossError, match=r"step 2: task 1 of the batch has the loss nan.*smaller inner_lr"):
        fit(algorithm, batches)
    assert parameters(algorithm).isfinite().all()


def batch_with_a_bad_task(bad: int) -> TaskBatch:
    tasks = sinusoids(1)[0].clone()
    tasks.support_x[bad, 0] = torch.nan
    return tasks


@pytest.mark.parametrize("engine", ["native", "torch"])
@pytest.mark.parametrize("name", ["maml", "reptile", "meta_sgd", "imaml"])
def test_a_task_that_is_no_number_shows_in_its_own_loss_alone(name: str, engine: str) -> None:
    torch.manual_seed(0)
    algorithm = innerloop.get(name)(nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 1)), engine=engine)
    losses = algorithm(batch_with_a_bad_task(1)).task_losses
    others = algorithm(sinusoids(1)[0]).task_losses
    assert losses.isnan().tolist() == [False, True, False]
    assert torch.equal(losses[[0, 2]], others[[0, 2]])


def test_a_bad_task_can_be_left_out_of_its_batch(caplog: pytest.LogCaptureFixture) -> None:
    algorithm, twin = build().eval(), build().eval()
    for each in (algorithm, twin):
        each.train = lambda mode=True, each=each: each  # without dropout both take the same step
    history = fit(algorithm, [batch_with_a_bad_task(1)], settings=TrainingSettings(steps=1, nonfinite="skip"))
    expected = fit(twin, [sinusoids(1)[0][[0, 2]]], settings=TrainingSettings(steps=1))
    assert torch.equal(parameters(algorithm), parameters(twin))
    assert history.steps == [{**expected.steps[0], "skipped": [1]}]
    assert "step 0: tasks [1] of the batch have no finite loss" in caplog.text


def test_what_a_bad_task_left_in_buffers_is_taken_back() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(784, 8), nn.BatchNorm1d(8))
    algorithm = innerloop.get("maml_pp")(nn.Sequential(model, nn.Linear(8, 5)), inner_steps=2)
    tasks = innerloop.data.get("glyphs").sample(3, ways=5, shots=1, queries=2, seed=0)
    tasks.support_x[2] = torch.inf
    fit(algorithm, [tasks], settings=TrainingSettings(steps=1, nonfinite="skip"))
    assert all(buffer.isfinite().all() for buffer in algorithm.buffers())
    assert parameters(algorithm).isfinite().all()


@pytest.mark.parametrize("chunk", [1, 2, 3, 9])
@pytest.mark.parametrize("bad", [None, 0, 4], ids=["all good", "the first bad", "the last bad"])
@pytest.mark.parametrize("name", ["maml", "meta_sgd", "maml_pp"])
def test_a_batch_in_chunks_is_the_same_step(name: str, bad: int | None, chunk: int) -> None:
    def trained(**settings: Any) -> tuple[innerloop.Algorithm, Any]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(784, 8), nn.BatchNorm1d(8), nn.Linear(8, 5)).double()
        algorithm = innerloop.get(name)(model)
        tasks = innerloop.data.get("glyphs").sample(5, ways=5, shots=1, queries=2, seed=0).to(torch.float64)
        if bad is not None:
            tasks.support_x[bad] = torch.inf
        seen: list[innerloop.Result] = []
        history = fit(
            algorithm,
            [tasks],
            optimizer=torch.optim.SGD(algorithm.parameters(), lr=0.1),
            settings=TrainingSettings(steps=2, nonfinite="skip", **settings),
            progress=lambda _, result: seen.append(result),
        )
        return algorithm, (history.steps, seen)

    (algorithm, (steps, seen)), (twin, (expected_steps, expected)) = trained(task_chunk=chunk), trained()
    close = {"rtol": 1e-10, "atol": 1e-12}
    torch.testing.assert_close(parameters(algorithm), parameters(twin), **close)
    assert [record.get("skipped") for record in steps] == [record.get("skipped") for record in expected_steps]
    for result, other in zip(seen, expected, strict=True):
        torch.testing.assert_close(result.loss, other.loss, **close)
        torch.testing.assert_close(result.task_losses, other.task_losses, **close, equal_nan=True)
        torch.testing.assert_close(result.logits, other.logits, **close, equal_nan=True)
        torch.testing.assert_close(result.accuracy, other.accuracy)
    counters = [buffer for buffer in algorithm.buffers() if not buffer.is_floating_point()]
    others = [buffer for buffer in twin.buffers() if not buffer.is_floating_point()]
    assert all(torch.equal(*pair) for pair in zip(counters, others, strict=True))
    assert all(buffer.isfinite().all() for buffer in algorithm.buffers())


def test_without_any_good_task_training_stops() -> None:
    tasks = batch_with_a_bad_task(1)[[1, 1]]
    with pytest.raises(NonFiniteLossError, match="task 0 of the batch has the loss nan"):
        fit(build(), [tasks], settings=TrainingSettings(steps=1, nonfinite="skip"))


@pytest.mark.parametrize("clip", [0.0, 1.0])
def test_a_gradient_that_is_no_number_changes_nothing(clip: float) -> None:
    class Steep(innerloop.Algorithm):
        """The loss is finite, its gradient is not."""

        def forward(self, tasks: TaskBatch) -> innerloop.Result:
            loss = self.model.weight.sum().mul(0).sqrt()
            return innerloop.Result(loss, loss.detach().expand(tasks.num_tasks), tasks.query_y)

        def adapt(self, support_x: torch.Tensor, support_y: torch.Tensor) -> nn.Module:
            return self.model

    algorithm = Steep(nn.Linear(1, 1))
    before = parameters(algorithm)
    with pytest.raises(NonFiniteLossError, match="step 0: every task's loss is finite, but the norm of the meta-grad"):
        fit(algorithm, sinusoids(1), settings=TrainingSettings(steps=1, clip=clip))
    assert torch.equal(parameters(algorithm), before)


def test_a_validation_that_is_no_number_is_never_the_best() -> None:
    history = innerloop.training.History(validations=[{"mean": mean} for mean in (math.nan, 0.5, 0.25, math.nan)])
    assert history.best(higher_is_better=True) == {"mean": 0.5}
    assert history.best(higher_is_better=False) == {"mean": 0.25}


def test_threads_are_set_while_training_and_put_back() -> None:
    with cpu_threads(2):
        seen = []
        settings = TrainingSettings(steps=1, threads=1)
        fit(build(), sinusoids(1), settings=settings, progress=lambda *_: seen.append(torch.get_num_threads()))
        assert seen == [1]
        assert torch.get_num_threads() == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps is 0, expected at least 1"),
        ({"shots": -1}, "shots is -1"),
        ({"schedule": "linear"}, "schedule is 'linear', expected 'constant' or 'cosine'"),
        ({"seed": -1}, "seed is -1"),
        ({"task_chunk": -1}, "task_chunk is -1"),
        ({"nonfinite": "ignore"}, "nonfinite is 'ignore', expected 'stop' or 'skip'"),
        ({"lr": 0.0}, "lr is 0.0"),
        ({"clip": float("nan")}, "clip nan"),
    ],
)
def test_settings_that_make_no_sense(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainingSettings(**options)


# --- the run folder ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("undisturbed")
    train(run, resume=False)
    return run


def assert_same_run(run: Path, other: Path) -> None:
    """The same bits in both checkpoints, random state and optimizer included, and the same metrics."""
    for name in (LATEST, BEST):
        tensors, others = load_file(run / name), load_file(other / name)
        assert tensors.keys() == others.keys()
        for key, value in tensors.items():
            assert torch.equal(value, others[key]), key
    assert (run / METRICS).read_text() == (other / METRICS).read_text()
    assert not list(run.glob(".*"))


def test_what_a_run_leaves(undisturbed: Path) -> None:
    records = read_metrics(undisturbed)
    steps = [record for record in records if "validation" not in record]
    validations = [record["validation"] for record in records if "validation" in record]
    assert [record["step"] for record in steps] == list(range(1, 7))
    assert all(record["accuracy"] is None and record["loss"] > 0 for record in steps)
    assert [record["step"] for record in validations] == [3, 6]
    algorithm = build()
    best = innerloop.checkpoint.load_checkpoint(undisturbed / BEST, algorithm)
    assert best == min(validations, key=lambda record: record["mean"])
    data = innerloop.data.get("sinusoid").split("val")
    again = innerloop.evaluate(algorithm, data, shots=5, episodes=SETTINGS.validation_episodes)
    assert again.mean == best["mean"]


def test_a_run_is_repeatable_and_its_settings_matter(undisturbed: Path, tmp_path: Path) -> None:
    train(tmp_path / "again", resume=False)
    assert_same_run(tmp_path / "again", undisturbed)


def test_a_run_is_not_overwritten(undisturbed: Path) -> None:
    with pytest.raises(FileExistsError, match="holds a training run: resume it"):
        train(undisturbed, resume=False)


def test_resuming_with_other_settings_is_refused(undisturbed: Path) -> None:
    algorithm = build()
    with pytest.raises(CheckpointError, match=r"was trained with lr=0\.001, not 0\.1"):
        fit(algorithm, sinusoids(1), settings=replace(SETTINGS, lr=0.1), run=undisturbed, resume=True)


@pytest.mark.parametrize("option", ["resume", "tensorboard"])
def test_what_needs_a_run_folder_says_so(option: str) -> None:
    with pytest.raises(ValueError, match=f"{option} needs the run folder"):
        fit(build(), sinusoids(1), **{option: True})


def test_tensorboard_events(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    train(tmp_path, tensorboard=True)
    events = accumulator.EventAccumulator(str(tmp_path)).Reload()
    records = read_metrics(tmp_path)
    for tag, expected in {
        "train/loss": [(record["step"], record["loss"]) for record in records if "loss" in record],
        "validation/mse": [
            (record["validation"]["step"], record["validation"]["mean"]) for record in records if "validation" in record
        ],
    }.items():
        written = [(event.step, event.value) for event in events.Scalars(tag)]
        assert [step for step, _ in written] == [step for step, _ in expected]
        assert [value for _, value in written] == pytest.approx([value for _, value in expected])


def test_without_tensorboard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    monkeypatch.delitem(sys.modules, "innerloop.tensorboard", raising=False)
    with pytest.raises(ImportError, match=r"pip install 'innerloop\[tensorboard\]'"):
        train(tmp_path, tensorboard=True)


# --- interrupted ------------------------------------------------------------------------------------


@pytest.mark.parametrize("last", [1, 3, 5, 6], ids=lambda last: f"in step {last}")
def test_ctrl_c_then_resume_is_the_undisturbed_run(undisturbed: Path, tmp_path: Path, last: int) -> None:
    """Step 3 ends with a validation: an interrupted run must not leave it out."""
    algorithm = build()
    data = innerloop.data.get("sinusoid")

    def interrupt(done: int, result: object) -> None:
        if done == last:
            signal.raise_signal(signal.SIGINT)

    history = fit(
        algorithm,
        data.split("train"),
        settings=SETTINGS,
        validation=data.split("val"),
        run=tmp_path,
        progress=interrupt,
    )
    assert history.interrupted
    assert len(history.steps) == last
    train(tmp_path)
    assert_same_run(tmp_path, undisturbed)


@pytest.fixture
def ctrl_c_interrupts() -> Iterator[None]:
    """A shell starts what runs in its background with Ctrl-C ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_a_second_ctrl_c_does_not_wait(ctrl_c_interrupts: None) -> None:
    def interrupt(done: int, result: object) -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        fit(build(), sinusoids(3), progress=interrupt)
    assert signal.getsignal(signal.SIGINT) is before


@pytest.fixture(scope="module")
def processes() -> multiprocessing.context.ForkServerContext:
    """Processes that start from one which has imported torch, so that each takes milliseconds."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch._dynamo", "innerloop.training", "innerloop.algorithms.maml"])
    return context


def test_killed_at_every_operation_on_files(
    undisturbed: Path, tmp_path: Path, processes: multiprocessing.context.ForkServerContext
) -> None:
    """Killed at the first operation, the second, …, each time a new run, resumed to its end without a disturbance."""
    operation = 0
    while True:
        operation += 1
        run = tmp_path / str(operation)
        process = processes.Process(target=train_and_die, args=(run, operation))
        process.start()
        process.join(60)
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
        train(run)
        assert_same_run(run, undisturbed)
    assert operation > 12


def test_killed_again_and_again_at_random(
    undisturbed: Path, tmp_path: Path, processes: multiprocessing.context.ForkServerContext
) -> None:
    randoms = random.Random(0)
    kills = 0
    # The early moments first: a run that has ended cannot be killed.
    for moment in sorted([0.0, *(randoms.uniform(0.0, 0.1) for _ in range(7))]):
        process = processes.Process(target=train, args=(tmp_path,))
        process.start()
        process.join(moment)
        if process.is_alive():
            process.kill()
            process.join(60)
            kills += 1
    train(tmp_path)
    assert_same_run(tmp_path, undisturbed)
    assert kills > 0


def test_ctrl_c_on_the_command_line(tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = [sys.executable, "-m", "innerloop", "train", "maml", "--data", "sinusoid", "--inner-lr", "0.01"]
    process = subprocess.Popen(
        [*command, "--steps", "1000000", "--validate-every", "50", "--run", str(run)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    deadline = time.monotonic() + 60
    while not (run / BEST).exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130, output
    assert f"go on with: innerloop train maml --run {run} --resume" in output
    assert "Traceback" not in output
    steps = [record["step"] for record in read_metrics(run) if "validation" not in record]
    config, _, algorithm = innerloop.runs.load_run(run)
    assert innerloop.checkpoint.load_checkpoint(run / LATEST, algorithm)["step"] == steps[-1] >= 50
    assert json.loads((run / "config.json").read_text())["algorithm"]["options"]["inner_lr"] == 0.01
    assert config.algorithm.name == "maml"
