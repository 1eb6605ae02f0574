"""A small training that can be killed: what test_training.py runs in processes of its own."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import innerloop
from innerloop.training import TrainingSettings, fit

SETTINGS = TrainingSettings(
    steps=6,
    meta_batch_size=3,
    shots=5,
    queries=5,
    schedule="cosine",
    validate_every=3,
    validation_episodes=4,
    threads=1,
)


def build() -> innerloop.Algorithm:
    torch.manual_seed(0)
    # Dropout draws from torch's random state: a resumed run must go on with that, too.
    model = nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Dropout(0.3), nn.Linear(8, 1))
    return innerloop.get("maml")(model, inner_lr=0.05, engine="torch")  # "auto" warns of dropout


def train(run: Path, resume: bool = True, **options: Any) -> innerloop.Algorithm:
    algorithm = build()
    data = innerloop.data.get("sinusoid")
    validation = data.split("val")
    fit(algorithm, data.split("train"), settings=SETTINGS, validation=validation, run=run, resume=resume, **options)
    return algorithm


def train_and_die(run: Path, operation: int) -> None:
    """Train; be killed at that operation of writing files, a write being killed in its middle."""
    done = 0

    def dying(function: Callable[..., Any], half: Callable[..., Any] = lambda *_: None) -> Callable[..., Any]:
        def counted(*arguments: Any) -> Any:
            nonlocal done
            done += 1
            if done == operation:
                half(*arguments)
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments)

        return counted

    write_bytes = Path.write_bytes
    Path.write_bytes = dying(write_bytes, lambda path, content: write_bytes(path, content[: len(content) // 2]))
    Path.replace = dying(Path.replace)
    os.fsync = dying(lambda descriptor: None)  # it is against a machine's death, not a process's, and slow
    train(run)
