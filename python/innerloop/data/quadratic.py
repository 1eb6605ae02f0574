"""Random quadratic functions as regression tasks."""

from __future__ import annotations

import copy

import numpy as np
import torch

from innerloop.contract import SPLITS, Dataset, Split
from innerloop.tasks import TaskBatch


class Quadratic(Dataset):
    """Functions f(θ) = ‖Wθ − y‖² to minimise, a task being one (W, y) (Andrychowicz et al. 2016, section 3.1).

    W [n, n] and y [n] are standard normal. As a regression they are n samples: x the rows of W and the targets those of
    y, both times √n, so that the mean squared error of the model ``linear``, whose weights are θ, is f. Query set and
    support set are the same.

    Args:
        dimensions: n; the paper's is 10.
    """

    target_shape = (1,)

    def __init__(self, dimensions: int = 10) -> None:
        if dimensions < 1:
            raise ValueError(f"dimensions is {dimensions}, expected at least 1")
        self.input_shape = (dimensions,)
        self._part = SPLITS.index("train")

    def split(self, name: Split) -> Quadratic:
        """Every part is endless; parts differ in their random numbers."""
        part = copy.copy(self)
        part._part = SPLITS.index(name)
        return part

    def sample(
        self, tasks: int, ways: int = 1, shots: int = 1, queries: int = 1, seed: int = 0, first_task: int = 0
    ) -> TaskBatch:
        """As :meth:`Dataset.sample`; ways, shots and queries are not read: a task has n samples."""
        if tasks < 1:
            raise ValueError(f"tasks is {tasks}, expected at least 1")
        (n,) = self.input_shape
        drawn = np.stack([self._numbers(seed, first_task + task, n) for task in range(tasks)])
        numbers = torch.from_numpy((np.sqrt(n) * drawn).astype(np.float32))
        x, y = numbers[..., :n], numbers[..., n:]
        return TaskBatch(x, y, x, y)

    def _numbers(self, seed: int, task: int, n: int) -> np.ndarray:
        """W and y of one task, [n, n + 1]."""
        random = np.random.Generator(np.random.Philox(key=[seed, self._part], counter=[0, 0, 0, task]))
        return random.standard_normal((n, n + 1))
