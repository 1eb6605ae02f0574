"""Sinusoid regression tasks."""

from __future__ import annotations

import copy

import numpy as np
import torch

from innerloop.contract import SPLITS, Dataset, Split
from innerloop.tasks import TaskBatch


class Sinusoid(Dataset):
    """Regression on y = A·sin(ω·x + φ), a task being one (A, ω, φ) (Finn et al. 2017, section 5.1).

    Amplitude A ~ U[0.1, 5], phase φ ~ U[0, π], inputs x ~ U[-5, 5]; ω = 1, or drawn as in Li et al. 2017 (Meta-SGD).
    MAML's defaults are for images. Here it needs the paper's ``inner_lr`` of 0.01 and 10 shots, with 10 queries: so
    trained for 3,000 steps it has a mean squared error of 0.9, by its defaults one of 6.8.

    Args:
        varying_frequency: draw ω ~ U[0.8, 1.2] for each task.
    """

    target_shape = (1,)

    def __init__(self, varying_frequency: bool = False) -> None:
        self.input_shape = (1,)
        self.varying_frequency = varying_frequency
        self._part = SPLITS.index("train")

    def split(self, name: Split) -> Sinusoid:
        """Every part is endless; parts differ in their random numbers."""
        part = copy.copy(self)
        part._part = SPLITS.index(name)
        return part

    def sample(self, tasks: int, ways: int, shots: int, queries: int, seed: int, first_task: int = 0) -> TaskBatch:
        """As :meth:`Dataset.sample`: shots and queries are samples of a task; ways is not read."""
        if min(tasks, shots, queries) < 1:
            raise ValueError(f"tasks, shots and queries are {tasks}, {shots}, {queries}, expected at least 1")
        drawn = np.stack([self._numbers(seed, first_task + task, shots + queries) for task in range(tasks)])
        amplitude, phase, frequency = drawn[:, :3].T[..., None]
        x = 10 * drawn[:, 3:] - 5
        y = (0.1 + 4.9 * amplitude) * np.sin(
            (0.8 + 0.4 * frequency if self.varying_frequency else 1) * x + np.pi * phase
        )
        samples = torch.from_numpy(np.stack((x, y))[..., None].astype(np.float32))
        (support_x, support_y), (query_x, query_y) = (part.unbind() for part in samples.split((shots, queries), dim=2))
        return TaskBatch(support_x, support_y, query_x, query_y)

    def _numbers(self, seed: int, task: int, samples: int) -> np.ndarray:
        """Uniform numbers in [0, 1) of one task: its three parameters, then the inputs of its samples."""
        random = np.random.Generator(np.random.Philox(key=[seed, self._part], counter=[0, 0, 0, task]))
        return random.random(3 + samples)
