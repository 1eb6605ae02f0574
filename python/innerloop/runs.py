"""A training run on disk: what was trained, on what, how; enough to build it again."""

from __future__ import annotations

import importlib.metadata
import inspect
import json
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from innerloop import models
from innerloop.atomic import write_atomically
from innerloop.checkpoint import CheckpointError, load_checkpoint
from innerloop.contract import Algorithm, Dataset
from innerloop.evaluation import batch_norm_mode
from innerloop.options import json_values, options_of
from innerloop.registry import Registry, algorithms, datasets
from innerloop.training import BEST, LATEST, TrainingSettings

CONFIG = "config.json"


@dataclass(frozen=True)
class Choice:
    """A plug-in, or a model, by name, with its options; distribution and version are what it came from."""

    name: str
    options: Mapping[str, Any]
    distribution: str = ""
    version: str = ""

    @classmethod
    def of(cls, registry: Registry[Any], name: str, options: Mapping[str, Any]) -> Choice:
        """With the distribution that the registry finds the name in, for the record."""
        short = name.rpartition(":")[2]
        owner = next((plugin for plugin in registry.plugins() if plugin.name == short), None)
        if owner is None:
            return cls(name, dict(options))
        return cls(name, dict(options), owner.distribution, owner.version)


@dataclass(frozen=True)
class RunConfig:
    """Everything that a run was started with.

    Attributes:
        evaluation_ways, episodes: of the tasks that the run is validated and tested on.
    """

    algorithm: Choice
    model: Choice
    data: Choice
    training: TrainingSettings
    evaluation_ways: int
    episodes: int

    def dataset(self) -> Dataset:
        cls = datasets.get(self.data.name)
        dataset: Dataset = cls(**_with_paths(self.data.options, cls))
        return dataset

    def build(self, dataset: Dataset) -> Algorithm:
        """The algorithm around a new model for this data; the same parameters every time, by the training seed."""
        cls = algorithms.get(self.algorithm.name)
        if dataset.target_shape is not None:
            outputs: int | None = int(np.prod(dataset.target_shape))
        else:
            outputs = self.training.ways if cls.needs_head else None
        builder = models.build(self.model.name)
        torch.manual_seed(self.training.seed)
        model = builder(dataset.input_shape, outputs, **self.model.options)
        options = _with_paths(self.algorithm.options, cls)
        algorithm: Algorithm = cls(model, **options, **_facts(self.algorithm.name, cls, dataset))
        return algorithm

    def save(self, run: Path, algorithm: Algorithm) -> None:
        """Write config.json, with the versions and the BatchNorm mode that a result depends on."""
        record = {
            "algorithm": _as_record(self.algorithm),
            "model": _as_record(self.model),
            "data": _as_record(self.data),
            "training": asdict(self.training),
            "evaluation": {"ways": self.evaluation_ways, "episodes": self.episodes},
            "seed": self.training.seed,
            "bn": batch_norm_mode(algorithm),
            "versions": {
                "innerloop": importlib.metadata.version("innerloop"),
                "torch": torch.__version__,
                "numpy": np.__version__,
                "python": platform.python_version(),
            },
        }
        write_atomically(run / CONFIG, (json.dumps(record, indent=2) + "\n").encode())

    @classmethod
    def load(cls, run: Path) -> RunConfig:
        """Read a run folder's config.json.

        Raises:
            FileNotFoundError: the folder holds no run.
            CheckpointError: its configuration cannot be read.
        """
        path = run / CONFIG
        if not path.exists():
            raise FileNotFoundError(f"{run} is no training run: it has no {CONFIG}")
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            return cls(
                algorithm=Choice(**record["algorithm"]),
                model=Choice(**record["model"]),
                data=Choice(**record["data"]),
                training=TrainingSettings(**record["training"]),
                evaluation_ways=record["evaluation"]["ways"],
                episodes=record["evaluation"]["episodes"],
            )
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise CheckpointError(f"{path} cannot be read: {error}") from error


def load_run(run: str | Path) -> tuple[RunConfig, Dataset, Algorithm]:
    """A run's configuration, data and trained algorithm, in eval mode: its best checkpoint, or else its latest."""
    run = Path(run)
    config = RunConfig.load(run)
    dataset = config.dataset()
    algorithm = config.build(dataset)
    load_checkpoint(run / BEST if (run / BEST).exists() else run / LATEST, algorithm)
    return config, dataset, algorithm.eval()


def default_model(dataset: Dataset) -> str:
    """The backbone for a data set's samples: images of 16 × 16 pixels or more, single numbers, or anything else."""
    shape = dataset.input_shape
    if len(shape) == 3 and min(shape[1:]) >= 16:
        return "conv4"
    return "sinusoid_mlp" if shape == (1,) else "mlp"


def _facts(name: str, cls: type, dataset: Dataset) -> dict[str, Any]:
    """What an algorithm's constructor asks to know of the training data (see Algorithm)."""
    asked = inspect.signature(cls).parameters
    facts: dict[str, Any] = {}
    if "input_shape" in asked:
        facts["input_shape"] = dataset.input_shape
    if "training_classes" in asked:
        facts["training_classes"] = getattr(dataset.split("train"), "num_classes", None)
        if facts["training_classes"] is None:
            raise ValueError(
                f"{name} learns to tell all training classes apart, and this data set does not number them"
            )
    return facts


def _as_record(choice: Choice) -> dict[str, Any]:
    return {**asdict(choice), "options": json_values(choice.options)}


def _with_paths(values: Mapping[str, Any], cls: type) -> dict[str, Any]:
    """Option values with those that JSON kept as text back as paths."""
    paths = {option.name for option in options_of(cls) if option.kind is Path}
    return {name: Path(value) if name in paths and value is not None else value for name, value in values.items()}
