"""Classes of image files as one array, decoded once into a memory-mapped cache.

A cache is a .npy file of uint8 pixels in ``$INNERLOOP_CACHE`` (default: ``~/.cache/innerloop``) with 64 bytes behind
the array: the SHA-256 of what it was made from, and the SHA-256 of everything before. Both are checked at each opening,
so a cache that is half-written, damaged, or older than the images is made anew. It may be deleted at any time.
"""

from __future__ import annotations

import hashlib
import logging
import os
import zipfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import numpy.typing as npt

from innerloop.atomic import replacing
from innerloop.contract import Split
from innerloop.data.images import ImagePath, read_image

FORMAT = "innerloop-images-1"
DIGEST = hashlib.sha256().digest_size

Images = npt.NDArray[np.uint8]
Indices = npt.NDArray[np.int64]

_log = logging.getLogger(__name__)


def load_classes(
    root: Path, parts: Mapping[Split, Mapping[str, Sequence[ImagePath]]], size: int, *, colour: bool
) -> tuple[Images, Indices, list[str], dict[Split, Indices]]:
    """The images of every class of every part, as the arguments of ClassDataset.

    Args:
        root: folder of the data set, which its cache is known by. parts: split → class name → image files.
        size: height and width that every image is brought to. colour: RGB, or grey.

    Returns: images [N, size, size, 3] or [N, size, size], class_sizes [C], class_names, splits.

    Raises:
        ValueError: a class that is in two splits, or a file that is no image.
        ImportError: Pillow is not installed.
    """
    names: dict[str, None] = {}
    files: list[ImagePath] = []
    sizes, splits = [], {}
    for part, classes in parts.items():
        for name, members in classes.items():
            if name in names:
                raise ValueError(f"class {name!r} of {root} is in two splits: a few-shot split shares no class")
            names[name] = None
            sizes.append(len(members))
            files += members
        splits[part] = np.arange(len(names) - len(classes), len(names))
    shape = (len(files), size, size, 3) if colour else (len(files), size, size)
    return _cached(root.resolve(), files, shape), np.array(sizes, dtype=np.int64), list(names), splits


def cache_folder() -> Path:
    """Where caches are kept."""
    return Path(os.environ.get("INNERLOOP_CACHE") or Path.home() / ".cache" / "innerloop")


def _cached(root: Path, files: Sequence[ImagePath], shape: tuple[int, ...]) -> Images:
    # One cache for a folder and kind of pixels: images that change replace it, and leave no old one behind.
    kind = hashlib.sha256(f"{root}\n{shape[1:]}".encode()).hexdigest()[:12]
    path = cache_folder() / f"{root.name}-{kind}.npy"
    fingerprint = _fingerprint(files, shape)
    images = _open(path, fingerprint, shape)
    if images is None:
        _log.info("decoding %d images of %s into %s", len(files), root, path)
        _build(path, fingerprint, files, shape)
        images = _open(path, fingerprint, shape)
    if images is None:
        raise OSError(f"{path} is not what was written to it: is the disk sound, and {root} unchanged meanwhile?")
    return images


def _fingerprint(files: Sequence[ImagePath], shape: tuple[int, ...]) -> bytes:
    """A hash of the names, sizes and times of the files (in an archive: the checksums), in order."""
    hashed = hashlib.sha256(f"{FORMAT} {shape}".encode())
    for path in files:
        if isinstance(path, zipfile.Path):
            stamp = f"{path.root.getinfo(path.at).CRC}"
        else:
            status = path.stat()
            stamp = f"{status.st_size} {status.st_mtime_ns}"
        hashed.update(f"\n{path} {stamp}".encode(errors="surrogateescape"))
    return hashed.digest()


def _open(path: Path, fingerprint: bytes, shape: tuple[int, ...]) -> Images | None:
    """The cached images, read-only and memory-mapped; None where there is no sound cache of these files."""
    pixels = int(np.prod(shape))
    try:
        whole = np.memmap(path, dtype=np.uint8, mode="r")
    except (FileNotFoundError, ValueError):  # ValueError: an empty file
        return None
    body, digest = whole[:-DIGEST], whole[-DIGEST:].tobytes()
    if len(body) < pixels + DIGEST or body[-DIGEST:].tobytes() != fingerprint:
        return None
    if hashlib.sha256(body.data).digest() != digest:
        _log.warning("%s is damaged: it is made anew", path)
        return None
    return body[-DIGEST - pixels : -DIGEST].reshape(shape)


def _build(path: Path, fingerprint: bytes, files: Sequence[ImagePath], shape: tuple[int, ...]) -> None:
    with replacing(path) as temporary:
        _decode(temporary, files, shape)
        with temporary.open("rb+") as file:
            hashed = hashlib.sha256()
            while block := file.read(1 << 20):
                hashed.update(block)
            hashed.update(fingerprint)
            file.write(fingerprint + hashed.digest())


def _decode(path: Path, files: Sequence[ImagePath], shape: tuple[int, ...]) -> None:
    """Write the images as a .npy file, without holding them all in memory."""
    images = np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=shape)

    def decode(index: int) -> None:
        images[index] = read_image(files[index], colour=len(shape) == 4, size=(shape[1], shape[2]))

    with ThreadPoolExecutor() as threads:  # Pillow decodes outside the interpreter's lock
        for _ in threads.map(decode, range(len(files))):
            pass
    images.flush()
