"""Meta-training: the loop, its settings, and what it leaves in a run folder."""

from __future__ import annotations

import json
import logging
import math
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from innerloop.atomic import write_atomically
from innerloop.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from innerloop.contract import Algorithm, Dataset, Result
from innerloop.distributed import add_up, add_up_gradients, copy_from_first, rank, share, wait_for_all, world_size
from innerloop.evaluation import evaluate
from innerloop.tasks import TaskBatch

if TYPE_CHECKING:
    from innerloop.tensorboard import Events

LATEST = "latest.safetensors"
BEST = "best.safetensors"
METRICS = "metrics.jsonl"

log = logging.getLogger("innerloop")


@dataclass(frozen=True)
class TrainingSettings:
    """How to meta-train.

    Args:
        steps: outer steps, one batch of tasks each.
        meta_batch_size: tasks of a batch.
        ways: classes of a training task.
        shots: support samples of a class.
        queries: query samples of a class.
        lr: learning rate of the outer optimizer, Adam.
        schedule: of the outer learning rate: constant, or a cosine down to zero.
        clip: largest norm of the meta-gradient; 0: unlimited.
        task_chunk: tasks whose gradient is computed at once, which bounds memory where an autograd graph is kept; the
            gradient is that of the batch, but BatchNorm of an embedding method in training normalises with a chunk.
            0: all.
        nonfinite: what a task whose loss is NaN or infinite does: stop training, or be left out of its batch.
        seed: of the stream of training tasks.
        validate_every: steps between validations, and between checkpoints.
        validation_episodes: tasks of a validation.
        threads: CPU threads that torch shares an operation between; 0: its own choice.
    """

    steps: int = 1000
    meta_batch_size: int = 8
    ways: int = 5
    shots: int = 1
    queries: int = 5
    lr: float = 1e-3
    schedule: Literal["constant", "cosine"] = "constant"
    clip: float = 10.0
    task_chunk: int = 0
    nonfinite: Literal["stop", "skip"] = "stop"
    seed: int = 0
    validate_every: int = 200
    validation_episodes: int = 200
    threads: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "meta_batch_size", "ways", "shots", "queries", "validate_every", "validation_episodes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least 1")
        if self.schedule not in ("constant", "cosine"):
            raise ValueError(f"schedule is {self.schedule!r}, expected 'constant' or 'cosine'")
        if self.nonfinite not in ("stop", "skip"):
            raise ValueError(f"nonfinite is {self.nonfinite!r}, expected 'stop' or 'skip'")
        for name in ("task_chunk", "seed", "threads"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least 0")
        if not self.lr > 0 or not self.clip >= 0:
            raise ValueError(f"lr is {self.lr} and clip {self.clip}, expected a positive number, and one of at least 0")


class NonFiniteLossError(RuntimeError):
    """A task's meta-loss, or the meta-gradient, became NaN or infinite; the message names the step and the task."""


@dataclass
class History:
    """What training reported.

    Attributes:
        steps: a record for each outer step: step, loss, accuracy (None for regression); where tasks were left out,
            their places in the batch as skipped, and loss and accuracy are those of the rest.
        validations: a record for each validation: step, mean, ci95.
        interrupted: whether Ctrl-C ended it early.
    """

    steps: list[dict[str, Any]] = field(default_factory=list)
    validations: list[dict[str, Any]] = field(default_factory=list)
    interrupted: bool = False

    def best(self, higher_is_better: bool) -> dict[str, Any] | None:
        """The best validation so far; one whose mean is NaN is worse than any other."""
        sign = 1 if higher_is_better else -1

        def score(record: dict[str, Any]) -> float:
            mean = float(record["mean"])
            return -math.inf if math.isnan(mean) else sign * mean

        return max(self.validations, key=score, default=None)


Progress = Callable[[int, Result], None]


def fit(
    algorithm: Algorithm,
    tasks: Dataset | Iterable[TaskBatch],
    *,
    settings: TrainingSettings | None = None,
    validation: Dataset | None = None,
    validation_ways: int = 5,
    optimizer: torch.optim.Optimizer | None = None,
    run: str | Path | None = None,
    resume: bool = False,
    tensorboard: bool = False,
    progress: Progress | None = None,
) -> History:
    """Meta-train an algorithm in place.

    Where torch.distributed has a process group, all its processes must call this, with the same arguments: they share
    each batch of tasks, and end with the same parameters, those of one process up to rounding. What BatchNorm of an
    embedding method normalises with is a process's share then. The first process writes the run folder.

    Args:
        algorithm: its parameters are trained.
        tasks: a Dataset, whose task stream makes a run exactly repeatable; or any iterable of TaskBatch, a list or a
            loader of one's own, gone through again and again until settings.steps.
        settings: None: the defaults, and for an iterable with a length one pass over it.
        validation: validated on every settings.validate_every steps; the best checkpoint is kept.
        validation_ways: classes of a validation task.
        optimizer: over the algorithm's parameters; None: Adam with settings.lr.
        run: folder for checkpoints and metrics; None: nothing is written.
        resume: continue from the run's latest checkpoint, bit for bit where tasks is a Dataset; without one, begin.
        tensorboard: write the metrics as TensorBoard events into the run folder, too.
        progress: called after each step with the number of steps done and its result (of several processes: with the
            loss, task losses and accuracies of the whole batch, and the logits of the process's share).

    Returns: the history. Ctrl-C ends training after the step in flight, with a checkpoint, and sets ``interrupted``.

    Raises:
        FileExistsError: run holds a training run already, and resume is False.
        CheckpointError: the checkpoint to resume from is damaged, of another model, or of other settings.
        ImportError: tensorboard is not installed.
        NonFiniteLossError: the meta-gradient is NaN or infinite; or a task's loss is, and settings.nonfinite is "stop"
            or no other task is left. The parameters are those before the step.

    Examples:
        >>> from innerloop.training import TrainingSettings
        >>> algorithm = innerloop.get("maml")(innerloop.models.build("mlp")((1, 28, 28), outputs=5), inner_lr=0.1)
        >>> settings = TrainingSettings(steps=3, meta_batch_size=2)
        >>> history = innerloop.fit(algorithm, innerloop.data.get("glyphs").split("train"), settings=settings)
        >>> [record["step"] for record in history.steps]
        [1, 2, 3]
    """
    if settings is None:
        settings = TrainingSettings()
        if isinstance(tasks, Sized) and not isinstance(tasks, Dataset):
            settings = TrainingSettings(steps=len(tasks))
    if optimizer is None:
        optimizer = torch.optim.Adam(algorithm.parameters(), lr=settings.lr)
    for group in optimizer.param_groups:
        group.setdefault("initial_lr", group["lr"])
    if hasattr(algorithm, "training_steps"):
        algorithm.training_steps = settings.steps
    trainer = _Trainer(algorithm, settings, optimizer, validation, validation_ways, None if run is None else Path(run))
    first = trainer.start(resume)
    if tensorboard and rank() == 0:
        trainer.open_events(first)
    with cpu_threads(settings.threads), closing(trainer), _interrupt_after_step() as interrupted:
        for step, batch in zip(range(first, settings.steps), _shares(tasks, settings, first), strict=False):
            result = trainer.step(step, batch)
            done = step + 1
            if progress is not None:
                progress(done, result)
            stop = bool(add_up(torch.tensor(int(interrupted()))))  # in all processes after the same step
            complete = done == settings.steps or done % settings.validate_every == 0
            if stop or complete:
                trainer.finish_period(done, validate=complete)
            if stop:
                trainer.history.interrupted = True
                break
    return trainer.history


@dataclass(frozen=True)
class _Share:
    """This process's tasks of a batch.

    Attributes:
        tasks: where there are fewer tasks than processes and none is left for this one, the first: it counts nothing,
            but whatever an algorithm does in a step, such as counting them, is done in every process.
        places: of the tasks that count, in the batch. total: number of tasks of the batch.
    """

    tasks: TaskBatch
    places: range
    total: int

    @property
    def weight(self) -> float:
        """Of their mean in that of the batch."""
        return len(self.places) / self.total


def _shares(tasks: Dataset | Iterable[TaskBatch], settings: TrainingSettings, first: int) -> Iterator[_Share]:
    if isinstance(tasks, Dataset):
        total = settings.meta_batch_size
        places = share(total)
        for step in range(first, settings.steps):
            batch = tasks.sample(
                max(len(places), 1),
                settings.ways,
                settings.shots,
                settings.queries,
                settings.seed,
                first_task=step * total + (places.start if places else 0),
            )
            yield _Share(batch, places, total)
        return
    number = 0
    while True:
        before = number
        for batch in tasks:
            if number >= first:  # a resumed run passes over what the interrupted one has seen
                places = share(len(batch))
                own = slice(places.start, places.stop) if places else slice(1)
                yield _Share(batch if world_size() == 1 else batch[own], places, len(batch))
            number += 1
        if number == before:
            raise ValueError("tasks is an iterable without a batch, or one that cannot be gone through twice")


@contextmanager
def cpu_threads(count: int) -> Iterator[None]:
    """Inside, torch shares an operation between this many CPU threads; 0 leaves it as it is."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _interrupt_after_step() -> Iterator[Callable[[], bool]]:
    """Ctrl-C inside lets the step in flight finish; a second one interrupts at once (main thread only)."""
    received = False

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal received
        received = True
        signal.signal(signal.SIGINT, previous)

    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    previous = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: received
    finally:
        signal.signal(signal.SIGINT, previous)


class _Trainer:
    """The state of one call of :func:`fit`."""

    def __init__(
        self,
        algorithm: Algorithm,
        settings: TrainingSettings,
        optimizer: torch.optim.Optimizer,
        validation: Dataset | None,
        validation_ways: int,
        run: Path | None,
    ) -> None:
        self.algorithm = algorithm
        self.settings = settings
        self.optimizer = optimizer
        self.validation = validation
        self.validation_ways = validation_ways
        self.run = run
        self.output = run if rank() == 0 else None  # the same, in the process that writes it
        self.history = History()
        self._unwritten: list[dict[str, Any]] = []
        self._events: Events | None = None

    def close(self) -> None:
        if self._events is not None:
            self._events.close()

    def open_events(self, first: int) -> None:
        """Write metrics as TensorBoard events from here on; those of steps beyond the first are forgotten."""
        if self.run is None:
            raise ValueError("tensorboard needs the run folder: run is None")
        from innerloop.tensorboard import Events

        self._events = Events(self.run, first)

    def start(self, resume: bool) -> int:
        """Prepare the run folder; returns the number of steps already done."""
        if self.run is None:
            if resume:
                raise ValueError("resume needs the run folder: run is None")
            copy_from_first(self.algorithm.state_dict().values())
            return 0
        is_new = self.output is not None and self._prepare_folder(self.output, resume)
        wait_for_all()  # the other processes begin from what the folder holds now
        return 0 if is_new else self._resume(self.run)

    def _prepare_folder(self, run: Path, resume: bool) -> bool:
        """Whether it holds a run that begins here."""
        latest = run / LATEST
        if latest.exists() and not resume:
            raise FileExistsError(f"run {run} holds a training run: resume it, or choose another folder")
        for unfinished in run.glob(".*.tmp"):  # a file that a killed process was writing
            unfinished.unlink()
        if latest.exists():
            return False
        self._save(run, 0)
        write_atomically(run / METRICS, b"")
        return True

    def _resume(self, run: Path) -> int:
        latest = run / LATEST
        state = load_checkpoint(latest, self.algorithm, self.optimizer)
        for name, value in asdict(self.settings).items():
            if state["settings"].get(name) != value:
                raise CheckpointError(
                    f"checkpoint {latest} was trained with {name}={state['settings'].get(name)!r}, not {value!r}: "
                    "a run is resumed with its own settings"
                )
        self.history.validations = state["validations"]
        self._forget_metrics_after(run, state["step"])
        step: int = state["step"]
        return step

    def step(self, step: int, batch: _Share) -> Result:
        settings = self.settings
        scale = 0.5 * (1 + math.cos(math.pi * step / settings.steps)) if settings.schedule == "cosine" else 1.0
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * scale
        self.algorithm.train()
        self.optimizer.zero_grad(set_to_none=True)
        whole, skipped = self._gradient(step, batch)
        self._check_and_clip_gradient(step)
        self.optimizer.step()
        accuracy = None if whole.accuracy is None else float(whole.accuracy)
        record: dict[str, Any] = {"step": step + 1, "loss": float(whole.loss), "accuracy": accuracy}
        if skipped:
            record["skipped"] = skipped
            log.warning("step %d: tasks %s of the batch have no finite loss and are left out", step, skipped)
        self.history.steps.append(record)
        self._unwritten.append(record)
        return whole

    def _gradient(self, step: int, batch: _Share) -> tuple[Result, list[int]]:
        """Leave the gradient of the batch's mean loss in the parameters; (the batch's result, tasks left out)."""
        results, counted = self._gradient_of_share(batch)
        whole = _of_whole_batch(_joined(results), batch)
        finite = torch.isfinite(whole.task_losses)
        skipped: list[int] = (~finite).nonzero().flatten().tolist()
        if skipped:
            all_bad = add_up(torch.tensor(int(len(batch.places) > 0 and counted == 0)))  # in some process
            if self.settings.nonfinite == "stop" or all_bad:
                raise NonFiniteLossError(
                    f"step {step}: task {skipped[0]} of the batch has the loss {float(whole.task_losses[skipped[0]])}; "
                    "a smaller inner_lr or lr may help"
                )
        add_up_gradients(self.algorithm.parameters(), counted / int(finite.sum()))
        if skipped:
            accuracies = whole.task_accuracies
            whole = replace(
                whole,
                loss=whole.task_losses[finite].mean(),
                task_accuracies=None if accuracies is None else accuracies[finite],
            )
        return whole, skipped

    def _gradient_of_share(self, batch: _Share) -> tuple[list[Result], int]:
        """Leave the gradient of the mean over this process's tasks in the parameters, those without a finite loss left
        out; (the results of its chunks, the number of tasks in that mean)."""
        chunk = self.settings.task_chunk or len(batch.tasks)
        starts = range(0, len(batch.tasks), chunk)
        chunks = [batch.tasks[start : start + chunk] for start in starts] if len(starts) > 1 else [batch.tasks]
        skipping = self.settings.nonfinite == "skip"
        initial = self._buffers() if skipping or len(chunks) > 1 else []
        results: list[Result] = []
        counted = 0
        for tasks in chunks:
            before = initial
            if results:  # a step counts once, whatever its number of chunks
                before = self._buffers()
                self._put_back(initial)
            result = self.algorithm(tasks)
            loss = result.loss
            results.append(replace(result, loss=loss.detach()))  # without the graph
            good = torch.isfinite(result.task_losses).nonzero().flatten().tolist()
            if not good:
                if skipping:
                    self._put_back(before)
                continue
            if len(good) < len(tasks) and skipping:
                self._put_back(initial)  # without what the pass over the bad task left
                loss = self.algorithm(tasks[good]).loss
            if batch.places:
                self._add_gradient(loss, len(good), counted)
                counted += len(good)
        return results, counted

    def _add_gradient(self, loss: Tensor, count: int, before: int) -> None:
        """Make the gradients, so far of a mean over ``before`` tasks, those of the mean over them and the loss's."""
        if before > 0:
            for parameter in self.algorithm.parameters():
                if parameter.grad is not None:
                    parameter.grad.mul_(before / (before + count))
            loss = loss * (count / (before + count))
        loss.backward()

    def _buffers(self) -> list[Tensor]:
        return [buffer.clone() for buffer in self.algorithm.buffers()]

    def _put_back(self, buffers: list[Tensor]) -> None:
        for buffer, value in zip(self.algorithm.buffers(), buffers, strict=True):
            buffer.copy_(value)

    def _check_and_clip_gradient(self, step: int) -> None:
        parameters = [parameter for parameter in self.algorithm.parameters() if parameter.grad is not None]
        norm = nn.utils.get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
        if not torch.isfinite(norm):
            raise NonFiniteLossError(
                f"step {step}: every task's loss is finite, but the norm of the meta-gradient is {float(norm)}; "
                "a smaller inner_lr or lr may help"
            )
        if self.settings.clip > 0:
            nn.utils.clip_grads_with_norm_(parameters, self.settings.clip, norm)

    def finish_period(self, done: int, validate: bool) -> None:
        """Validate, keep the best, and save where to go on from."""
        copy_from_first(self.algorithm.buffers())  # running statistics are of the tasks that a process has seen
        if validate and self.validation is not None:
            record = evaluate(
                self.algorithm,
                self.validation,
                ways=self.validation_ways,
                shots=self.settings.shots,
                episodes=self.settings.validation_episodes,
                seed=self.settings.seed,
                distributed=True,
            )
            entry = {"step": done, "mean": record.mean, "ci95": record.ci95, "metric": record.metric}
            self.history.validations.append(entry)
            self._unwritten.append({"validation": entry})
            if self.output is not None and self.history.best(record.higher_is_better) is entry:
                save_checkpoint(self.output / BEST, self.algorithm, entry)
        if self.output is not None:
            # Metrics first: what they say beyond the checkpoint is dropped when a run resumes.
            with (self.output / METRICS).open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(record) + "\n" for record in self._unwritten)
            if self._events is not None:
                self._events.write(self._unwritten)
            self._unwritten = []
            self._save(self.output, done)

    def _save(self, run: Path, done: int) -> None:
        state = {"step": done, "validations": self.history.validations, "settings": asdict(self.settings)}
        save_checkpoint(run / LATEST, self.algorithm, state, self.optimizer)

    def _forget_metrics_after(self, run: Path, step: int) -> None:
        kept = [record for record in read_metrics(run) if record.get("validation", record)["step"] <= step]
        self.history.steps = [record for record in kept if "validation" not in record]
        if self.output is not None:
            lines = "".join(json.dumps(record) + "\n" for record in kept)
            write_atomically(self.output / METRICS, lines.encode())


def _joined(results: list[Result]) -> Result:
    """The result of a batch from those of its chunks."""
    if len(results) == 1:
        return results[0]
    counts = [len(result.task_losses) for result in results]
    accuracies = [result.task_accuracies for result in results if result.task_accuracies is not None]
    return Result(
        torch.stack([result.loss * count for result, count in zip(results, counts, strict=True)]).sum() / sum(counts),
        torch.cat([result.task_losses for result in results]),
        torch.cat([result.logits for result in results]),
        torch.cat(accuracies) if accuracies else None,
    )


def _of_whole_batch(result: Result, batch: _Share) -> Result:
    """The result with loss, task losses and accuracies of all processes' tasks."""
    if world_size() == 1:
        return result
    table = torch.zeros(3, batch.total, dtype=torch.float64)  # float64 holds every float32 as it is
    places = slice(batch.places.start, batch.places.stop)
    count = len(batch.places)
    table[0, places] = result.task_losses[:count].double().cpu()
    if result.task_accuracies is not None:
        table[1, places] = result.task_accuracies[:count].double().cpu()
    table[2, 0] = batch.weight * float(result.loss) if count else 0.0
    losses, accuracies, (loss, *_) = add_up(table).to(result.loss).unbind()
    known = None if result.task_accuracies is None else accuracies
    return replace(result, loss=loss, task_losses=losses, task_accuracies=known)


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The records of a run's metrics file; a last line that a crash cut off is left out."""
    records = []
    if (run / METRICS).exists():
        for line in (run / METRICS).read_text(encoding="utf-8").splitlines():
            try:
                records.append(json.loads(line))
            except json.JSONDecodeError:
                break
    return records
