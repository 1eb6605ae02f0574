"""miniImageNet from a local folder."""

from __future__ import annotations

import csv
from pathlib import Path

from innerloop.contract import SPLITS
from innerloop.data.class_dataset import ClassDataset
from innerloop.data.image_cache import load_classes
from innerloop.data.images import SUFFIXES, ImagePath


class MiniImageNet(ClassDataset):
    """miniImageNet (Vinyals et al. 2016): 100 classes of ImageNet, 600 images each, in colour, 84 × 84.

    Reads ``root/train.csv``, ``val.csv`` and ``test.csv`` (columns filename and label: the split of Ravi and Larochelle
    2017, 64, 16 and 20 classes) and the images they name, anywhere below ``root/images``.

    Args:
        root: the folder that holds train.csv, val.csv, test.csv and images.

    Raises:
        FileNotFoundError: a list, or an image that it names, is not there.
    """

    def __init__(self, root: Path) -> None:
        root = Path(root).expanduser()
        folder = root / "images"
        for path in (*(root / f"{part}.csv" for part in SPLITS), folder):
            if not path.exists():
                raise FileNotFoundError(
                    f"miniImageNet's {path.name} is not in {root}. The lists train.csv, val.csv and test.csv are in "
                    "Ravi and Larochelle's repository (twitter-research/meta-learning-lstm on GitHub); the images come "
                    "from ImageNet (image-net.org), and few-shot libraries such as LibFewShot offer both together"
                )
        found: dict[str, ImagePath] = {path.name: path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES}
        parts = {part: _listed(root / f"{part}.csv", folder, found) for part in SPLITS}
        super().__init__(*load_classes(root, parts, 84, colour=True))


def _listed(path: Path, folder: Path, found: dict[str, ImagePath]) -> dict[str, list[ImagePath]]:
    """Class → images, as a list names them."""
    classes: dict[str, list[ImagePath]] = {}
    with path.open(newline="") as file:
        rows = csv.DictReader(file)
        if not {"filename", "label"} <= set(rows.fieldnames or ()):
            raise ValueError(f"{path} has the columns {rows.fieldnames}, expected filename and label")
        for row in rows:
            if row["filename"] not in found:
                raise FileNotFoundError(f"{path} names {row['filename']}, which is not below {folder}")
            classes.setdefault(row["label"], []).append(found[row["filename"]])
    return classes
