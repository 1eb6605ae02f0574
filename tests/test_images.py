"""Image files as a model gets them."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from innerloop.data.images import class_folders, image_files, read_image


def saved(path: Path, array: np.ndarray, **options: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **options)
    return path


GREY = np.arange(12, dtype=np.uint8).reshape(3, 4) * 20


@pytest.mark.parametrize(
    ("array", "colour", "expected"),
    [
        (GREY, False, GREY),
        (GREY, True, np.stack([GREY] * 3, axis=2)),
        (np.stack([GREY] * 3, axis=2), False, GREY),
        (GREY.astype(np.uint16) * 257, False, GREY),
    ],
    ids=["grey", "grey as colour", "colour as grey", "16 bits"],
)
def test_pixels(tmp_path: Path, array: np.ndarray, colour: bool, expected: np.ndarray) -> None:
    pixels = read_image(saved(tmp_path / "a.png", array), colour=colour)
    assert pixels.dtype == np.uint8
    np.testing.assert_array_equal(pixels, expected)


def test_transparent_is_white(tmp_path: Path) -> None:
    black = np.zeros((2, 2, 4), np.uint8)
    black[:, 1, 3] = 255  # the right column is opaque
    np.testing.assert_array_equal(read_image(saved(tmp_path / "a.png", black), colour=False), [[255, 0]] * 2)


def test_a_camera_turned_on_its_side(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    path = saved(tmp_path / "a.png", GREY, exif=exif)
    np.testing.assert_array_equal(read_image(path, colour=False), np.rot90(GREY, -1))


def test_size_averages(tmp_path: Path) -> None:
    checkers = np.indices((8, 12)).sum(axis=0) % 2 * np.uint8(254)
    pixels = read_image(saved(tmp_path / "a.png", checkers.astype(np.uint8)), colour=False, size=(2, 3))
    assert pixels.shape == (2, 3)
    np.testing.assert_allclose(pixels, 127, atol=8)


@pytest.mark.parametrize("content", [b"", b"no image", b"\x89PNG\r\n\x1a\nbroken"])
def test_a_broken_file_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "bad.png").write_bytes(content)
    with pytest.raises(ValueError, match=r"bad\.png cannot be read as an image"):
        read_image(tmp_path / "bad.png", colour=False)


def test_without_pillow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(ImportError, match=r"pip install 'innerloop\[images\]'"):
        read_image(tmp_path / "a.png", colour=False)


def test_folders(tmp_path: Path) -> None:
    for name in ("cat/2.png", "cat/1.PNG", "dog/1.jpg", ".cache/1.png"):
        saved(tmp_path / name, GREY)
    (tmp_path / "cat" / "notes.txt").write_text("not an image")
    found = class_folders(tmp_path)
    assert {name: [path.name for path in files] for name, files in found.items()} == {
        "cat": ["1.PNG", "2.png"],
        "dog": ["1.jpg"],
    }


def test_missing_folders(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        image_files(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match="has no class folders"):
        class_folders(tmp_path)
    (tmp_path / "cat").mkdir()
    with pytest.raises(FileNotFoundError, match="cat has no image file"):
        class_folders(tmp_path)
