"""What two processes of one group do, for test_distributed.py: each writes what it found into a folder."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import innerloop
from innerloop import TaskBatch
from innerloop.contract import Algorithm, Dataset, Split
from innerloop.training import NonFiniteLossError, TrainingSettings, fit

SIZE = 2

#: 5 tasks a batch: 2 for one process, 3 for the other.
SETTINGS = TrainingSettings(
    steps=6, meta_batch_size=5, shots=4, queries=6, validate_every=3, validation_episodes=30, clip=0.5
)


class Sinusoids(Dataset):
    """The sinusoids in float64, where the order of a sum shows in the last digits alone."""

    input_shape, target_shape = (1,), (1,)

    def __init__(self, data: Dataset | None = None) -> None:
        self.data = data or innerloop.data.get("sinusoid")

    def split(self, name: Split) -> Dataset:
        return Sinusoids(self.data.split(name))

    def sample(self, tasks: int, ways: int, shots: int, queries: int, seed: int, first_task: int = 0) -> TaskBatch:
        return self.data.sample(tasks, ways, shots, queries, seed, first_task).to(torch.float64)


def build(name: str, **options: Any) -> Algorithm:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1, 12), nn.Tanh(), nn.Linear(12, 1))
    return innerloop.get(name)(model, **options).double()


#: Name of a case → algorithm and its options.
ALGORITHMS: dict[str, tuple[str, dict[str, Any]]] = {
    "maml": ("maml", {"inner_lr": 0.05, "inner_steps": 2}),
    "maml, torch engine": ("maml", {"inner_lr": 0.05, "engine": "torch"}),
    "meta_sgd": ("meta_sgd", {"inner_lr": 0.05}),
    "reptile": ("reptile", {"inner_lr": 0.02, "inner_steps": 3}),
}


def batches() -> list[TaskBatch]:
    """Of 4, 3 and 1 tasks: the last has none for one of the processes."""
    data = Sinusoids()
    return [data.sample(count, 1, 4, 6, seed=1, first_task=10 * count) for count in (4, 3, 1)]


def outcome(algorithm: nn.Module, history: innerloop.training.History) -> dict[str, Any]:
    return {
        "parameters": nn.utils.parameters_to_vector(algorithm.parameters()).tolist(),
        "losses": [record["loss"] for record in history.steps],
        "validations": history.validations,
        "interrupted": history.interrupted,
    }


def train(name: str, run: Path | None = None) -> dict[str, Any]:
    algorithm_name, options = ALGORITHMS[name]
    algorithm = build(algorithm_name, **options)
    data = Sinusoids()
    return outcome(
        algorithm, fit(algorithm, data.split("train"), settings=SETTINGS, validation=data.split("val"), run=run)
    )


def train_on_batches() -> dict[str, Any]:
    algorithm = build("maml", inner_lr=0.05)
    return outcome(algorithm, fit(algorithm, batches()))


def evaluate() -> dict[str, Any]:
    algorithm = build("maml", inner_lr=0.05)
    result = {}
    for name, tasks in {"data set": Sinusoids().split("test"), "batches": batches()}.items():
        record = innerloop.evaluate(algorithm, tasks, shots=4, episodes=70, distributed=True)
        result[name] = record.as_dict()
    embedding = innerloop.get("protonet")(nn.Sequential(nn.Flatten(), nn.Linear(784, 8)))
    nn.init.constant_(embedding.model[1].weight, 0.1)
    glyphs = innerloop.data.get("glyphs").split("val")
    result["embeddings"] = innerloop.evaluate(embedding, glyphs, episodes=45, distributed=True).as_dict()
    return result


def gradient_by_ddp() -> list[float]:
    """Of DistributedDataParallel around an algorithm, each process with as many tasks."""
    algorithm = build("maml", inner_lr=0.05)
    tasks = batches()[0]
    if dist.is_initialized():
        own = tasks[2 * dist.get_rank() : 2 * dist.get_rank() + 2]
        parallel = nn.parallel.DistributedDataParallel(algorithm)
        parallel(own).loss.backward()
    else:
        algorithm(tasks).loss.backward()
    return torch.cat([p.grad.flatten() for p in algorithm.parameters() if p.grad is not None]).tolist()


def refusals() -> dict[str, str]:
    model = nn.parallel.DistributedDataParallel(nn.Linear(1, 1).double())
    messages = {}
    for name, call in {
        "maml_loss": lambda: innerloop.maml_loss(model, batches()[0], inner_lr=0.1),
        "algorithm": lambda: innerloop.get("maml")(model, inner_lr=0.1)(batches()[0]),
    }.items():
        try:
            call()
        except TypeError as error:
            messages[name] = str(error)
    return messages


def nan_task() -> str:
    tasks = batches()[0]
    tasks.support_x[3] = torch.nan
    try:
        fit(build("maml", inner_lr=0.05), [tasks])
    except NonFiniteLossError as error:
        return str(error)
    return ""


def interrupted(folder: Path) -> dict[str, Any]:
    """Ctrl-C reaches one process alone, after its second step."""

    def interrupt(done: int, result: Any) -> None:
        if done == 2 and dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGINT)

    algorithm = build("maml", **ALGORITHMS["maml"][1])
    data = Sinusoids().split("train")
    return outcome(algorithm, fit(algorithm, data, settings=SETTINGS, run=folder, progress=interrupt))


def resumed(folder: Path) -> dict[str, Any]:
    """From the second process's own parameters, which the folder's replace."""
    algorithm = build("maml", **ALGORITHMS["maml"][1])
    if dist.get_rank() == 1:
        for parameter in algorithm.parameters():
            nn.init.zeros_(parameter)
    data = Sinusoids().split("train")
    return outcome(algorithm, fit(algorithm, data, settings=SETTINGS, run=folder, resume=True))


def run_all(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=SIZE)
    cases: dict[str, Callable[[], Any]] = {
        **{name: partial(train, name) for name in ALGORITHMS},
        "on batches": train_on_batches,
        "in a folder": lambda: train("maml", folder / "run"),
        "evaluate": evaluate,
        "ddp": gradient_by_ddp,
        "refusals": refusals,
        "nan": nan_task,
        "interrupted": lambda: interrupted(folder / "interrupted"),
        "resumed": lambda: resumed(folder / "interrupted"),
    }
    found = {name: case() for name, case in cases.items()}
    (folder / f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()
