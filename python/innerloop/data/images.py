"""Image files and folders of them, read with Pillow (the extra ``images``)."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from PIL.Image import Image as PillowImage

#: An image file on disk, or in a zip archive, which is read in place: nothing is ever unpacked.
ImagePath = Path | zipfile.Path

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")


def image_files(folder: Path) -> list[Path]:
    """The image files of a folder itself, sorted by name.

    Raises:
        FileNotFoundError: there is no such folder, or no image in it.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}")
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES and path.is_file())
    if not files:
        raise FileNotFoundError(f"{folder} has no image file ({', '.join(SUFFIXES)})")
    return files


def class_folders(root: Path) -> dict[str, list[Path]]:
    """Class name → its image files, for a folder with one folder of images for each class; sorted by name.

    Raises:
        FileNotFoundError: there is no such folder, no class in it, or a class without images.
    """
    if not root.is_dir():
        raise FileNotFoundError(f"there is no folder {root}")
    folders = sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    if not folders:
        raise FileNotFoundError(f"{root} has no class folders: expected {root}/CLASS NAME/IMAGE FILE")
    return {folder.name: image_files(folder) for folder in folders}


def read_image(path: ImagePath, *, colour: bool, size: tuple[int, int] | None = None) -> npt.NDArray[np.uint8]:
    """An image's pixels, upright, on white where it is transparent, stretched to a size.

    Args:
        path: the file. colour: RGB, or grey. size: (height, width); None: its own.

    Returns: [H, W, 3] for colour, [H, W] for grey.

    Raises:
        ImportError: Pillow is not installed.
        ValueError: the file is no image that Pillow can read.
    """
    try:
        from PIL import Image, ImageOps
    except ImportError as error:
        raise ImportError("reading images needs Pillow: pip install 'innerloop[images]'") from error
    try:
        with path.open("rb") as file, Image.open(file) as opened:
            image: PillowImage = ImageOps.exif_transpose(opened)
            image.load()
    except (OSError, SyntaxError, ValueError, zipfile.BadZipFile) as error:  # SyntaxError: a broken PNG
        raise ValueError(f"{path} cannot be read as an image: {error}") from error
    if image.mode.startswith("I"):  # 16 bits of grey, which Pillow would clip at 255
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if "A" in image.mode or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("RGB" if colour else "L")
    if size is not None and size != (image.height, image.width):
        image = image.resize((size[1], size[0]), Image.Resampling.BILINEAR)  # it averages when it makes smaller
    return np.asarray(image)
