"""Memory: the same after a thousand steps of training, and bounded for any number of tasks."""

from __future__ import annotations

import torch
from torch import nn

import innerloop
from innerloop import TaskBatch
from innerloop.bench.memory import forget_peak, peak_megabytes, resident_megabytes
from innerloop.training import TrainingSettings, fit


def growth_in_training(steps: int) -> float:
    """Megabytes by which the process grows over the last four fifths of a training on glyphs, validations included."""
    torch.manual_seed(0)
    data = innerloop.data.get("glyphs")
    model = innerloop.models.build("conv4")((1, 28, 28), 5, filters=8, downsample="stride")
    algorithm = innerloop.get("maml")(model, inner_lr=0.1, engine="native")
    sizes: list[float] = []
    fit(
        algorithm,
        data.split("train"),
        settings=TrainingSettings(
            steps=steps, meta_batch_size=4, queries=2, validate_every=steps // 25, validation_episodes=20
        ),
        validation=data.split("val"),
        progress=lambda done, result: sizes.append(resident_megabytes()),
    )
    return max(sizes[steps // 5 :]) - max(sizes[: steps // 5])


def growth_with_tasks(few: int, many: int) -> tuple[float, float, float]:
    """(megabytes that a call on few and on many tasks needs beyond its tensors, the relative difference of the gradient
    of many from that of its parts), by the native engine in float64, one thread."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = innerloop.models.build("conv4")((1, 28, 28), 5, filters=16).double()
    x = torch.randn(many, 5, 1, 28, 28, dtype=torch.float64)
    tasks = TaskBatch(x, torch.arange(5).repeat(many, 1), x, torch.arange(5).repeat(many, 1))

    def gradient(part: TaskBatch, share: float) -> None:
        (share * innerloop.maml_loss(model, part, inner_lr=0.1, inner_steps=2, engine="native")).backward()

    def collected() -> torch.Tensor:
        found = nn.utils.parameters_to_vector([parameter.grad for parameter in model.parameters()])
        model.zero_grad()
        return found

    def needed(part: TaskBatch) -> float:
        forget_peak()
        before = resident_megabytes()
        gradient(part, 1.0)
        return peak_megabytes() - before

    gradient(tasks[:few], 1.0)  # what is allocated once
    model.zero_grad()
    small = needed(tasks[:few])
    model.zero_grad()
    large = needed(tasks)
    whole = collected()
    for start in range(0, many, few):
        part = tasks[start : start + few]
        gradient(part, len(part) / many)
    parts = collected()
    return small, large, float((whole - parts).norm() / whole.norm())


def of_chunks(chunk: int, many: int) -> tuple[float, float, float]:
    """(megabytes that a training step on a chunk of tasks, on many in such chunks, and on many at once needs), by the
    torch engine in float32, one thread."""
    torch.manual_seed(0)
    data = innerloop.data.get("glyphs").split("train")
    model = innerloop.models.build("conv4")((1, 28, 28), 5, filters=16)
    algorithm = innerloop.get("maml")(model, inner_lr=0.1, engine="torch")

    def needed(tasks: int, task_chunk: int) -> float:
        settings = TrainingSettings(steps=1, meta_batch_size=tasks, queries=1, task_chunk=task_chunk, threads=1)
        forget_peak()
        before = resident_megabytes()
        fit(algorithm, data, settings=settings)
        return peak_megabytes() - before

    needed(1, 0)  # what is allocated once
    return needed(chunk, 0), needed(many, chunk), needed(many, 0)
