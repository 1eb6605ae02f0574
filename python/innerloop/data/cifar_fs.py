"""CIFAR-FS from a local folder."""

from __future__ import annotations

from pathlib import Path

from innerloop.contract import SPLITS
from innerloop.data.class_dataset import ClassDataset
from innerloop.data.image_cache import load_classes
from innerloop.data.images import ImagePath, image_files


class CifarFS(ClassDataset):
    """CIFAR-FS (Bertinetto et al. 2019): the 100 classes of CIFAR-100, 600 images each, in colour, 32 × 32.

    Reads the layout of the authors' archive: ``data/CLASS/IMAGE`` and the lists of 64, 16 and 20 classes
    ``splits/bertinetto/train.txt``, ``val.txt`` and ``test.txt``, in root or in root/cifar100.

    Args:
        root: the folder that holds cifar100, or data and splits.

    Raises:
        FileNotFoundError: a list, or the images of a class that it names, are not there.
    """

    def __init__(self, root: Path) -> None:
        root = Path(root).expanduser()
        base = root / "cifar100" if (root / "cifar100").is_dir() else root
        parts = {part: _listed(base, base / "splits" / "bertinetto" / f"{part}.txt") for part in SPLITS}
        super().__init__(*load_classes(root, parts, 32, colour=True))


def _listed(base: Path, path: Path) -> dict[str, list[ImagePath]]:
    """Class → images, for the classes that a list names."""
    if not path.is_file():
        raise FileNotFoundError(
            f"CIFAR-FS: there is no {path}. Get cifar100.zip of Bertinetto et al. (the project bertinetto/r2d2 on "
            "GitHub links to it, and learn2learn keeps a copy on Zenodo) and unpack it there"
        )
    names = path.read_text().split()
    return {name: list(image_files(base / "data" / name)) for name in names}
