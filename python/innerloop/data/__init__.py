"""Data sets, found by name like algorithms: ``innerloop.data.get("glyphs")``."""

from __future__ import annotations

from typing import Any

from innerloop.contract import Dataset
from innerloop.data.class_dataset import ClassDataset
from innerloop.registry import datasets

__all__ = ["ClassDataset", "available", "get", "register"]

available = datasets.available
register = datasets.register


def get(name: str | type[Dataset], **options: Any) -> Dataset:
    """The data set of that name, its whole; ``.split("train")`` gives a part. Options go to its constructor.

    Raises:
        UnknownNameError, PluginError: as :meth:`innerloop.registry.Registry.get`.
    """
    dataset: Dataset = datasets.get(name)(**options)
    return dataset
