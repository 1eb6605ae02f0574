"""Meta-training by Lightning's Trainer: any algorithm as a LightningModule (the extra ``lightning``).

    from innerloop.compat.lightning import MetaLearner, TaskStream

    data = innerloop.data.get("glyphs")
    learner = MetaLearner("maml", model, options={"inner_lr": 0.4}, optimizer=partial(torch.optim.SGD, lr=0.1))
    loader = DataLoader(TaskStream(data.split("train"), batches=1000), batch_size=None)
    lightning.Trainer(max_epochs=1).fit(learner, loader)

docs/lightning.md has the whole of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset as TorchDataset

import innerloop
from innerloop.contract import Algorithm, Dataset, Result
from innerloop.tasks import TaskBatch

try:
    from lightning.pytorch import LightningModule
except ImportError as error:
    raise ImportError("innerloop.compat.lightning needs lightning: pip install 'innerloop[lightning]'") from error


#: innerloop.fit's own choice.
ADAM = partial(torch.optim.Adam, lr=1e-3)


class MetaLearner(LightningModule):
    """A LightningModule that meta-trains an algorithm; its batches are TaskBatches.

    Training, validation and test steps log ``train_loss``, ``val_loss``, ``test_loss`` and, for class labels,
    ``train_accuracy``, ``val_accuracy``, ``test_accuracy``: means over tasks. ``learner.algorithm`` is the algorithm,
    with its ``adapt``; :func:`innerloop.evaluate` on it gives a confidence interval.

    The arguments are not in a checkpoint: ``MetaLearner.load_from_checkpoint(path, algorithm=..., model=...)`` takes
    them again.

    Args:
        algorithm: its name (``innerloop.available()``), or a class of one's own.
        model: handed to the algorithm.
        options: the algorithm's other arguments, by name.
        optimizer: parameters → what configure_optimizers returns: an optimizer, or Lightning's dictionary of an
            optimizer and a schedule.

    Raises:
        UnknownNameError, PluginError: as :func:`innerloop.get`. TypeError, ValueError: the algorithm's.
    """

    algorithm: Algorithm

    def __init__(
        self,
        algorithm: str | type[Algorithm],
        model: nn.Module,
        options: Mapping[str, Any] | None = None,
        optimizer: Callable[[Iterator[nn.Parameter]], Any] = ADAM,
    ) -> None:
        super().__init__()
        self.algorithm = innerloop.get(algorithm)(model, **(options or {}))
        self.make_optimizer = optimizer

    def setup(self, stage: str) -> None:
        precision = str(self.trainer.precision)
        if precision.endswith("-true") and precision != "32-true":
            raise ValueError(
                f"the Trainer's precision is {precision!r}, which cannot convert a TaskBatch: leave it at '32-true', "
                "and give a model and tasks of the dtype wanted, as by model.double() and tasks.to(torch.float64)"
            )

    def on_train_start(self) -> None:
        steps = self.trainer.estimated_stepping_batches
        if hasattr(self.algorithm, "training_steps") and math.isfinite(steps):
            self.algorithm.training_steps = int(steps)

    def configure_optimizers(self) -> Any:
        return self.make_optimizer(self.algorithm.parameters())

    def forward(self, tasks: TaskBatch) -> Result:
        return self.algorithm(tasks)

    def training_step(self, tasks: TaskBatch, batch_idx: int) -> Tensor:
        result = self.algorithm(_checked(tasks))
        self._log("train", result)
        return result.loss

    def validation_step(self, tasks: TaskBatch, batch_idx: int) -> None:
        self._log("val", self._evaluate(tasks))

    def test_step(self, tasks: TaskBatch, batch_idx: int) -> None:
        self._log("test", self._evaluate(tasks))

    def _evaluate(self, tasks: TaskBatch) -> Result:
        # The Trainer evaluates in inference mode. Its tensors cannot be part of a gradient, which adapting needs.
        with torch.inference_mode(False), torch.no_grad():
            if _checked(tasks).support_x.is_inference():
                tasks = tasks.clone()
            return self.algorithm(tasks)

    def _log(self, stage: Literal["train", "val", "test"], result: Result) -> None:
        values = {f"{stage}_loss": result.loss.detach()}
        if result.accuracy is not None:
            values[f"{stage}_accuracy"] = result.accuracy
        self.log_dict(values, prog_bar=True, batch_size=len(result.task_losses), sync_dist=stage != "train")


class TaskStream(TorchDataset[TaskBatch]):
    """A data set's task stream as batches for ``DataLoader(..., batch_size=None)``: those that innerloop.fit trains on.

    Batch i holds tasks i·tasks … (i + 1)·tasks − 1 of the stream, wherever it is drawn: in a worker of the loader, or
    in one of several processes that share the batches.

    Args:
        dataset: what to sample from. batches: their number, an epoch.
        tasks: in a batch. ways: classes of a task. shots, queries: support and query samples of a class. seed: of the
            stream.
    """

    def __init__(
        self,
        dataset: Dataset,
        batches: int,
        tasks: int = 8,
        ways: int = 5,
        shots: int = 1,
        queries: int = 5,
        seed: int = 0,
    ) -> None:
        for name, value in (("batches", batches), ("tasks", tasks)):
            if value < 1:
                raise ValueError(f"{name} is {value}, expected at least 1")
        self.dataset = dataset
        self.batches = batches
        self.tasks = tasks
        self.sizes = (ways, shots, queries, seed)

    def __len__(self) -> int:
        return self.batches

    def __getitem__(self, batch: int) -> TaskBatch:
        if not 0 <= batch < self.batches:
            raise IndexError(f"batch {batch} of a stream of {self.batches}")
        return self.dataset.sample(self.tasks, *self.sizes, first_task=batch * self.tasks)


def _checked(tasks: TaskBatch) -> TaskBatch:
    if not isinstance(tasks, TaskBatch):
        raise TypeError(
            f"the loader gave a {type(tasks).__name__}, expected a TaskBatch: "
            "DataLoader(TaskStream(...), batch_size=None) gives them"
        )
    return tasks
