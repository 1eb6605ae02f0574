"""Runs example scripts of learn2learn 0.2.0 with its own import and with innerloop.compat.learn2learn in its place, and
compares what they print and the gradients of all outer steps.

    .venv/bin/python benchmarks/learn2learn_scripts.py FOLDER      FOLDER: examples/ of the source release

learn2learn_tests.sh downloads the release and runs this.

Each run is a process of its own, in learn2learn's environment. The files run as they are but for that one line; what
they cannot have here is put in its place before either import: of learn2learn, whose umbrella module imports gym and
torchvision, the parts that the scripts name; for the images of Omniglot, which are a download, our glyphs in the same
shape; for torchmeta's sinusoids, ours. docs/learn2learn.md has the outcome.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

import innerloop
from rivals import PEERS
from rivals.importing import skip_umbrella

IMPORTS = {"learn2learn": "import learn2learn as l2l", "compat": "import innerloop.compat.learn2learn as l2l"}

#: How a script's main() is called, for a few of its outer steps; of maml_toy.py, what its constants become.
SCRIPTS: dict[str, dict[str, Any]] = {
    "maml_toy.py": {"TIMESTEPS": 20},
    "maml_sine.py": {"num_tasks": 20 * 16},
    "vision/maml_omniglot.py": {"cuda": False, "num_iterations": 10, "meta_batch_size": 8},
}


def main() -> None:
    (folder,) = sys.argv[1:]
    python = PEERS / "learn2learn" / "bin" / "python"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for script in SCRIPTS:
        with tempfile.TemporaryDirectory() as scratch:
            files = {package: Path(scratch) / f"{package}.npz" for package in IMPORTS}
            printed = [
                subprocess.run(
                    [python, __file__, folder, script, package, str(file)],
                    env=environment,
                    stdout=subprocess.PIPE,
                    check=True,
                ).stdout
                for package, file in files.items()
            ]
            assert printed[0] == printed[1] != b"", f"{script} does not print the same"
            theirs, ours = (np.load(file) for file in files.values())
            steps = len(theirs.files)
            assert steps == len(ours.files) > 0, script
            largest = max(relative(ours[step], theirs[step]) for step in theirs.files)
            print(
                f"{script}: {steps} outer steps print the same, gradients differ by {largest:.1e} at most", flush=True
            )
            assert largest < 1e-5, script
            assert relative(theirs[theirs.files[0]], theirs[theirs.files[-1]]) > 1e-3, f"{script} does not train"


def relative(actual: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(actual - expected).max() / np.abs(expected).max())


# --- one run --------------------------------------------------------------------------------------


def run(folder: str, script: str, package: str, file: str) -> None:
    """Run a script by one of the imports; saves the gradient of each outer step."""
    source = (Path(folder) / script).read_text()
    assert source.count(IMPORTS["learn2learn"]) == 1
    stand_in_for_learn2learn()
    stand_in_for_torchmeta()
    gradients = record_outer_steps()
    torch.manual_seed(0)
    names: dict[str, Any] = {"__name__": "script"}
    exec(compile(source.replace(IMPORTS["learn2learn"], IMPORTS[package]), script, "exec"), names)
    used = names["l2l"].algorithms.MAML.__module__
    assert used == IMPORTS[package].split()[1] + ".algorithms.maml", used
    constants = {name: value for name, value in SCRIPTS[script].items() if name in names}
    names.update(constants)
    names["main"](**{name: value for name, value in SCRIPTS[script].items() if name not in constants})
    np.savez(file, *gradients)


def stand_in_for_learn2learn() -> None:
    """What ``import learn2learn`` would give, as far as the scripts and OmniglotFC read it."""
    packages = ("algorithms", "nn", "vision", "vision.models")
    skip_umbrella("learn2learn", *(f"learn2learn.{package}" for package in packages))
    umbrella = sys.modules["learn2learn"]
    umbrella.algorithms = SimpleNamespace(MAML=import_module("learn2learn.algorithms.maml").MAML)
    umbrella.nn = SimpleNamespace(Flatten=import_module("learn2learn.nn.misc").Flatten)
    umbrella.vision = SimpleNamespace(
        models=import_module("learn2learn.vision.models.cnn4"),
        benchmarks=SimpleNamespace(get_tasksets=glyph_tasksets),
    )


def glyph_tasksets(name: str, train_ways: int, train_samples: int, **options: Any) -> SimpleNamespace:
    """In the place of Omniglot's: images [ways · samples, 1, 28, 28] and labels, class by class."""

    class Tasks:
        def __init__(self, split: Any) -> None:
            self.data, self.drawn = innerloop.data.get("glyphs").split(split), 0

        def sample(self) -> tuple[Tensor, Tensor]:
            tasks = self.data.sample(1, train_ways, train_samples, 1, seed=0, first_task=self.drawn)
            self.drawn += 1
            order = tasks.support_y[0].argsort(stable=True)
            return tasks.support_x[0, order], tasks.support_y[0, order]

    return SimpleNamespace(train=Tasks("train"), validation=Tasks("val"), test=Tasks("test"))


def stand_in_for_torchmeta() -> None:
    """Its sinusoids, whose modules import torchvision: tasks of the same kind, [T, samples, 1] each."""

    def batches(tasks: tuple[int, int], batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        samples, count = tasks
        for first in range(0, count, batch_size):
            batch = innerloop.data.get("sinusoid").sample(batch_size, 1, samples, 1, seed=0, first_task=first)
            yield batch.support_x, batch.support_y

    names = {
        "torchmeta.toy": {"Sinusoid": lambda num_samples_per_task, num_tasks: (num_samples_per_task, num_tasks)},
        "torchmeta.utils.data": {"BatchMetaDataLoader": batches},
    }
    for name in ("torchmeta", "torchmeta.toy", "torchmeta.utils", "torchmeta.utils.data"):
        sys.modules[name] = ModuleType(name)
        vars(sys.modules[name]).update(names.get(name, {}))


def record_outer_steps() -> list[np.ndarray]:
    """The gradients, flat, that Adam's steps are given from now on."""
    found: list[np.ndarray] = []
    step = torch.optim.Adam.step

    def recording(self: torch.optim.Adam, *args: Any) -> Any:
        parts = [p.grad.flatten() for group in self.param_groups for p in group["params"]]
        found.append(torch.cat(parts).numpy().copy())
        return step(self, *args)

    torch.optim.Adam.step = recording
    return found


if __name__ == "__main__":
    if len(sys.argv) == 2:
        main()
    else:
        run(*sys.argv[1:])
