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

    Examples:
        >>> glyphs = innerloop.data.get("glyphs")
        >>> glyphs.input_shape
        (1, 28, 28)
        >>> batch = glyphs.split("train").sample(tasks=4, ways=5, shots=1, queries=3, seed=0)
        >>> batch.support_x.shape, batch.query_y.shape
        (torch.Size([4, 5, 1, 28, 28]), torch.Size([4, 15]))
    """
    dataset: Dataset = datasets.get(name)(**options)
    return dataset
