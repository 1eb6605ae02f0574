"""Glyphs: the built-in few-shot data set of characters."""

from __future__ import annotations

from importlib.resources import as_file, files

import numpy as np

from innerloop.contract import Split
from innerloop.data.class_dataset import ClassDataset, add_quarter_turns


class Glyphs(ClassDataset):
    """Letters of twelve scripts, 28 × 28, 20 samples each; test scripts are never trained on.

    An Omniglot-like set (Lake et al. 2015) that needs no download: 1,433 letters rendered from the DejaVu fonts with
    affine and elastic jitter (generate_glyphs.py). Split by script, as Omniglot by alphabet: train Latin, Canadian
    syllabics, Georgian, Old Italic; validation Cyrillic, Arabic, Coptic, Lisu; test Armenian, Greek, Lao, Hebrew.
    Ink is 1, paper 0.

    Args:
        rotations: add each training letter turned by 90, 180 and 270 degrees as classes of their own, as is usual on
            Omniglot (Santoro et al. 2016).
    """

    def __init__(self, rotations: bool = True) -> None:
        with as_file(files("innerloop.data") / "glyphs.npz") as path, np.load(path, allow_pickle=False) as stored:
            bits, letters, splits = stored["bits"], stored["letters"], stored["splits"]
        images = np.unpackbits(bits, axis=2).reshape(-1, 28, 28) * np.uint8(255)
        names = [str(letter) for letter in letters]
        parts: dict[Split, np.ndarray] = {part: np.flatnonzero(splits == part) for part in ("train", "val", "test")}
        sizes = np.full(len(names), bits.shape[1])
        if rotations:
            images, sizes, names, added = add_quarter_turns(images, sizes, names, parts["train"])
            parts["train"] = np.concatenate([parts["train"], added])
        super().__init__(images, sizes, names, parts)
