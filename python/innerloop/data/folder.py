"""Anybody's images, one folder a class."""

from __future__ import annotations

import hashlib
from pathlib import Path

from innerloop.contract import SPLITS, Split
from innerloop.data.class_dataset import ClassDataset
from innerloop.data.image_cache import load_classes
from innerloop.data.images import ImagePath, class_folders

Classes = dict[str, list[ImagePath]]


class Folder(ClassDataset):
    """Your own images: a folder with one folder of images for each class.

    Either ``root/CLASS/IMAGE``, whose classes are dealt to the splits by chance, or ``root/train/CLASS/IMAGE`` with
    ``root/val`` and ``root/test`` beside it, which are taken as they are. Grey or colour, of any size.

    Args:
        root: the folder.
        size: height and width that every image is stretched to.
        grey: turn colours into grey: one channel instead of three.
        val: share of the classes that is kept for validation.
        test: share of the classes that is kept for testing.
        seed: which classes these are.

    Raises:
        FileNotFoundError: no such folder, no class folders in it, or a class without images.
        ValueError: shares that leave no class to train on, a class in two splits, or a file that is no image.
    """

    def __init__(
        self, root: Path, size: int = 84, grey: bool = False, val: float = 0.2, test: float = 0.2, seed: int = 0
    ) -> None:
        root = Path(root).expanduser()
        if size < 1:
            raise ValueError(f"size is {size}, expected at least 1")
        parts = _given_splits(root) or _drawn_splits(class_folders(root), val, test, seed)
        super().__init__(*load_classes(root, parts, size, colour=not grey))


def _given_splits(root: Path) -> dict[Split, Classes] | None:
    """The splits that the folder is divided into already; None where it holds classes."""
    there = [
        part for part in SPLITS if (root / part).is_dir() and any(path.is_dir() for path in (root / part).iterdir())
    ]
    if not there:
        return None
    missing = [part for part in SPLITS if part not in there]
    if missing:
        raise FileNotFoundError(
            f"{root} has class folders in {' and '.join(there)} but not in {root / missing[0]}: "
            "expected train, val and test, or class folders alone"
        )
    return {part: _classes(root / part) for part in SPLITS}


def _classes(folder: Path) -> Classes:
    return {name: list(files) for name, files in class_folders(folder).items()}


def _drawn_splits(classes: dict[str, list[Path]], val: float, test: float, seed: int) -> dict[Split, Classes]:
    """Shares of the classes. A class's place in line is a hash of its name, so that new classes leave others there."""
    if not (val >= 0 and test >= 0 and val + test < 1):
        raise ValueError(f"val is {val} and test {test}, expected shares of the classes that add up to less than 1")
    line = sorted(classes, key=lambda name: hashlib.sha256(f"{seed} {name}".encode()).digest())
    counts = {"val": round(val * len(line)), "test": round(test * len(line))}
    chosen = {"val": line[: counts["val"]], "test": line[counts["val"] : counts["val"] + counts["test"]]}
    chosen["train"] = line[counts["val"] + counts["test"] :]
    if not chosen["train"]:
        raise ValueError(f"val is {val} and test {test}, which leaves none of {len(line)} classes to train on")
    return {part: {name: list(classes[name]) for name in sorted(chosen[part])} for part in SPLITS}
