"""Omniglot from a local folder."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np

from innerloop.contract import Split
from innerloop.data.class_dataset import ClassDataset, add_quarter_turns
from innerloop.data.image_cache import load_classes
from innerloop.data.images import ImagePath

VALIDATION_ALPHABETS = ("Armenian", "Bengali", "Early_Aramaic", "Hebrew", "Mkhedruli_(Georgian)")
LAST_TRAINING_CHARACTER = "Gurmukhi/character41"


class Omniglot(ClassDataset):
    """Omniglot (Lake et al. 2015): 1,623 characters of 50 alphabets, 20 drawings each, 28 × 28; ink is 1, paper 0.

    Reads images_background and images_evaluation, each a folder or the .zip of the Omniglot project (which is not
    unpacked), in root or in root/omniglot-py, where torchvision puts them.

    Args:
        root: the folder that holds images_background and images_evaluation.
        protocol: "vinyals", the split of the few-shot papers (Vinyals et al. 2016, as published with Snell et al.
            2017): 1,028 training, 172 validation and 423 test characters. "background": no character of
            images_evaluation is trained on: 792, 172 and 659.
        rotations: add each training character turned by 90, 180 and 270 degrees as classes of their own, as is usual
            (Santoro et al. 2016).

    Raises:
        FileNotFoundError: the drawings are not there.
    """

    def __init__(
        self, root: Path, protocol: Literal["vinyals", "background"] = "vinyals", rotations: bool = True
    ) -> None:
        if protocol not in ("vinyals", "background"):
            raise ValueError(f"protocol is {protocol!r}, expected 'vinyals' or 'background'")
        root = Path(root).expanduser()
        parts: dict[Split, dict[str, list[ImagePath]]] = {"train": {}, "val": {}, "test": {}}
        for name, path in _drawings(root, "images_background"):
            part: Split = "val" if name.startswith(tuple(f"{each}/" for each in VALIDATION_ALPHABETS)) else "train"
            parts[part].setdefault(name, []).append(path)
        for name, path in _drawings(root, "images_evaluation"):
            part = "train" if protocol == "vinyals" and name <= LAST_TRAINING_CHARACTER else "test"
            parts[part].setdefault(name, []).append(path)
        images, sizes, names, splits = load_classes(root, parts, 28, colour=False)
        images = 255 - images
        if rotations:
            images, sizes, names, added = add_quarter_turns(images, sizes, names, splits["train"])
            splits["train"] = np.concatenate([splits["train"], added])
        super().__init__(images, sizes, names, splits)


def _drawings(root: Path, part: str) -> Iterator[tuple[str, ImagePath]]:
    """("alphabet/character", file) of every drawing of images_background or images_evaluation, in order."""
    for folder in (root / "omniglot-py", root):
        archive = folder / f"{part}.zip"
        if (folder / part).is_dir():
            paths: list[ImagePath] = [*(folder / part).glob("*/character*/*.png")]
        elif archive.is_file():
            try:
                content = zipfile.ZipFile(archive)
            except zipfile.BadZipFile as error:
                raise ValueError(f"{archive} cannot be read: {error}") from error
            paths = [zipfile.Path(content, name) for name in content.namelist() if _is_drawing(name, part)]
        else:
            continue
        if not paths:
            raise FileNotFoundError(f"{folder / part} holds no ALPHABET/characterNN/NAME.png")
        for path in sorted(paths, key=str):
            yield "/".join(str(path).split("/")[-3:-1]), path
        return
    raise FileNotFoundError(
        f"Omniglot's {part} (a folder, or {part}.zip) is neither in {root} nor in {root / 'omniglot-py'}. Get "
        "images_background.zip and images_evaluation.zip from the Omniglot project (brendenlake/omniglot on GitHub, "
        f"folder python), or let torchvision.datasets.Omniglot download them to {root}"
    )


def _is_drawing(name: str, part: str) -> bool:
    pieces = name.split("/")
    return len(pieces) == 4 and pieces[0] == part and pieces[2].startswith("character") and name.endswith(".png")
