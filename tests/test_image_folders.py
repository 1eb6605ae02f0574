"""Data sets of image files: the layouts they read, what they say of missing files, and their cache."""

from __future__ import annotations

import multiprocessing
import shutil
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import innerloop
from innerloop.contract import SPLITS, Split
from innerloop.data.class_dataset import ClassDataset
from innerloop.data.image_cache import cache_folder


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the caches, empty."""
    path = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("INNERLOOP_CACHE", str(path))
    return path


def save(path: Path, value: int, size: int = 8, colour: bool = True) -> None:
    """A square of one brightness, by which a test knows it again."""
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = (size, size, 3) if colour else (size, size)
    Image.fromarray(np.full(shape, value, np.uint8)).save(path)


def classes_of(dataset: ClassDataset) -> dict[Split, set[str]]:
    return {part: {dataset.class_names[index] for index in dataset.split(part).classes} for part in SPLITS}


def values(dataset: ClassDataset, name: str) -> list[int]:
    """The brightness of each image of a class."""
    images = dataset.class_examples(dataset.class_names.index(name))
    return [int(image.flat[0]) for image in images]


# --- the layouts ---------------------------------------------------------------------------------------------------

ALPHABETS = {
    "images_background": {"Greek": 3, "Hebrew": 2},
    "images_evaluation": {"Angelic": 2, "Gurmukhi": 43, "Tibetan": 1},
}


def make_omniglot(folder: Path) -> None:
    for part, alphabets in ALPHABETS.items():
        for alphabet, characters in alphabets.items():
            for character in range(1, characters + 1):
                for drawing in (1, 2):
                    path = folder / part / alphabet / f"character{character:02d}" / f"0001_{drawing:02d}.png"
                    save(path, 255 - character - 100 * (drawing - 1), size=105, colour=False)


def zipped(folder: Path) -> None:
    """Each part as the Omniglot project's archive instead of as a folder."""
    for part in ALPHABETS:
        with zipfile.ZipFile(folder / f"{part}.zip", "w") as archive:
            for path in sorted((folder / part).rglob("*.png")):
                archive.write(path, path.relative_to(folder))
            archive.writestr(f"__MACOSX/{part}/Greek/character01/._0001_01.png", b"not an image")
            archive.writestr(f"{part}/../../character01/outside.png", b"not an image")
        shutil.rmtree(folder / part)


OMNIGLOT_PLACES: list[tuple[str, bool]] = [(".", False), (".", True), ("omniglot-py", False), ("omniglot-py", True)]


@pytest.mark.parametrize(("place", "as_zip"), OMNIGLOT_PLACES)
def test_omniglot(tmp_path: Path, place: str, as_zip: bool) -> None:
    make_omniglot(tmp_path / "data" / place)
    if as_zip:
        zipped(tmp_path / "data" / place)
    before = sorted((tmp_path / "data").rglob("*"))
    dataset = innerloop.data.get("omniglot", root=tmp_path / "data", rotations=False)
    assert isinstance(dataset, ClassDataset)
    assert dataset.input_shape == (1, 28, 28)
    assert classes_of(dataset) == {
        "train": {f"Greek/character{number:02d}" for number in (1, 2, 3)}
        | {"Angelic/character01", "Angelic/character02"}
        | {f"Gurmukhi/character{number:02d}" for number in range(1, 42)},
        "val": {"Hebrew/character01", "Hebrew/character02"},
        "test": {"Gurmukhi/character42", "Gurmukhi/character43", "Tibetan/character01"},
    }
    assert values(dataset, "Gurmukhi/character42") == [42, 142]  # ink is 255
    assert sorted((tmp_path / "data").rglob("*")) == before  # nothing is unpacked


def test_omniglot_background_protocol_and_rotations(tmp_path: Path) -> None:
    make_omniglot(tmp_path)
    dataset = innerloop.data.get("omniglot", root=tmp_path, protocol="background")
    assert isinstance(dataset, ClassDataset)
    found = classes_of(dataset)
    upright = {f"Greek/character{number:02d}" for number in (1, 2, 3)}
    assert found["train"] == upright | {f"{name} turned {degrees}°" for name in upright for degrees in (90, 180, 270)}
    assert found["val"] == {"Hebrew/character01", "Hebrew/character02"}
    assert len(found["test"]) == 46
    with pytest.raises(ValueError, match="protocol is 'lake', expected"):
        innerloop.data.get("omniglot", root=tmp_path, protocol="lake")


def make_miniimagenet(root: Path) -> None:
    for number, part in enumerate(SPLITS):
        lines = ["filename,label"]
        for label in range(2):
            for image in range(3):
                name = f"n{number}{label}{image}.jpg"
                save(root / "images" / (f"n{number}{label}" if part == "val" else ".") / name, 100 * label + image)
                lines.append(f"{name},n{number}{label}")
        (root / f"{part}.csv").write_text("\n".join(lines) + "\n")


def test_miniimagenet(tmp_path: Path) -> None:
    make_miniimagenet(tmp_path)
    dataset = innerloop.data.get("miniimagenet", root=tmp_path)
    assert isinstance(dataset, ClassDataset)
    assert dataset.input_shape == (3, 84, 84)
    assert classes_of(dataset) == {"train": {"n00", "n01"}, "val": {"n10", "n11"}, "test": {"n20", "n21"}}
    assert values(dataset, "n11") == [100, 101, 102]
    (tmp_path / "images" / "n000.jpg").unlink()
    with pytest.raises(FileNotFoundError, match=r"train\.csv names n000\.jpg, which is not below .*images"):
        innerloop.data.get("miniimagenet", root=tmp_path)
    (tmp_path / "train.csv").write_text("image,class\n")
    with pytest.raises(ValueError, match=r"train\.csv has the columns \['image', 'class'\], expected filename and"):
        innerloop.data.get("miniimagenet", root=tmp_path)


def make_cifar_fs(base: Path) -> None:
    (base / "splits" / "bertinetto").mkdir(parents=True)
    for number, (part, names) in enumerate({"train": ["apple", "bee"], "val": ["cup"], "test": ["rose"]}.items()):
        (base / "splits" / "bertinetto" / f"{part}.txt").write_text("\n".join(names) + "\n")
        for name in names:
            for image in range(3):
                save(base / "data" / name / f"{name}_s_{image}.png", 50 * number + image, size=32)


@pytest.mark.parametrize("place", [".", "cifar100"])
def test_cifar_fs(tmp_path: Path, place: str) -> None:
    make_cifar_fs(tmp_path / place)
    dataset = innerloop.data.get("cifar_fs", root=tmp_path)
    assert isinstance(dataset, ClassDataset)
    assert dataset.input_shape == (3, 32, 32)
    assert classes_of(dataset) == {"train": {"apple", "bee"}, "val": {"cup"}, "test": {"rose"}}
    assert values(dataset, "rose") == [100, 101, 102]
    shutil.rmtree(tmp_path / place / "data" / "rose")
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*rose"):
        innerloop.data.get("cifar_fs", root=tmp_path)


def make_folder(root: Path, classes: int = 10, images: int = 3) -> None:
    for label in range(classes):
        for image in range(images):
            save(root / f"class{label}" / f"{image}.png", 20 * label + image, size=5 + label, colour=label % 2 == 0)


def folder(root: Path, **options: Any) -> ClassDataset:
    dataset = innerloop.data.get("folder", root=root, **options)
    assert isinstance(dataset, ClassDataset)
    return dataset


def test_folder(tmp_path: Path) -> None:
    make_folder(tmp_path / "data")
    dataset = folder(tmp_path / "data", size=12)
    assert dataset.input_shape == (3, 12, 12)
    assert folder(tmp_path / "data", size=12, grey=True).input_shape == (1, 12, 12)
    parts = classes_of(dataset)
    assert [len(parts[part]) for part in SPLITS] == [6, 2, 2]
    assert set.union(*parts.values()) == {f"class{label}" for label in range(10)}
    assert values(dataset, "class7") == [140, 141, 142]
    tasks = dataset.split("train").sample(2, ways=5, shots=1, queries=2, seed=0)
    assert tasks.query_x.shape == (2, 10, 3, 12, 12)


def test_folder_splits_follow_the_seed_and_the_shares(tmp_path: Path) -> None:
    make_folder(tmp_path)
    assert classes_of(folder(tmp_path)) == classes_of(folder(tmp_path))
    assert classes_of(folder(tmp_path, seed=1)) != classes_of(folder(tmp_path))
    assert [len(part) for part in classes_of(folder(tmp_path, val=0, test=0.5)).values()] == [5, 0, 5]


def test_a_folder_that_is_divided_already(tmp_path: Path) -> None:
    for part, names in {"train": ["a", "b"], "val": ["c"], "test": ["d"]}.items():
        for name in names:
            save(tmp_path / part / name / "1.png", 7)
    assert classes_of(folder(tmp_path)) == {"train": {"a", "b"}, "val": {"c"}, "test": {"d"}}
    save(tmp_path / "test" / "a" / "1.png", 7)
    with pytest.raises(ValueError, match=r"class 'a' of .* is in two splits"):
        folder(tmp_path)
    shutil.rmtree(tmp_path / "val")
    with pytest.raises(FileNotFoundError, match=r"class folders in train and test but not in .*val"):
        folder(tmp_path)


def test_a_class_may_be_called_test(tmp_path: Path) -> None:
    for name in ("test", "train", "other"):
        save(tmp_path / name / "1.png", 7)
    assert set.union(*classes_of(folder(tmp_path, val=0, test=0)).values()) == {"test", "train", "other"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"val": 0.6, "test": 0.4}, "val is 0.6 and test 0.4, expected shares .* less than 1"),
        ({"val": -0.1}, "val is -0.1"),
        ({"val": 0.49, "test": 0.5}, "leaves none of 2 classes to train on"),
        ({"size": 0}, "size is 0, expected at least 1"),
    ],
)
def test_folder_options_that_cannot_be(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    make_folder(tmp_path, classes=2)
    with pytest.raises(ValueError, match=message):
        folder(tmp_path, **options)


# --- missing files -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("omniglot", r"images_background .*images_background\.zip\) is neither in {root} nor in .*omniglot-py\. Get"),
        ("miniimagenet", r"train\.csv is not in {root}\. .*meta-learning-lstm .*image-net\.org"),
        ("cifar_fs", r"there is no {root}/splits/bertinetto/train\.txt\. Get cifar100\.zip"),
        ("folder", "{root} has no class folders"),
    ],
)
def test_missing_files_are_named_with_where_to_get_them(tmp_path: Path, name: str, message: str) -> None:
    with pytest.raises(FileNotFoundError, match=message.format(root=tmp_path)):
        innerloop.data.get(name, root=tmp_path)


def test_a_part_of_omniglot_is_missing(tmp_path: Path) -> None:
    make_omniglot(tmp_path)
    shutil.rmtree(tmp_path / "images_evaluation")
    with pytest.raises(FileNotFoundError, match="Omniglot's images_evaluation"):
        innerloop.data.get("omniglot", root=tmp_path)
    (tmp_path / "images_evaluation.zip").write_bytes(b"the first part of a down")
    with pytest.raises(ValueError, match=r"images_evaluation\.zip cannot be read: File is not a zip file"):
        innerloop.data.get("omniglot", root=tmp_path)


def test_a_file_that_is_no_image_is_named_and_leaves_no_cache(tmp_path: Path, cache: Path) -> None:
    make_folder(tmp_path / "data")
    (tmp_path / "data" / "class3" / "1.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"class3.1\.png cannot be read as an image"):
        folder(tmp_path / "data")
    assert list(cache.iterdir()) == []


def test_without_pillow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_folder(tmp_path)
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(ImportError, match=r"pip install 'innerloop\[images\]'"):
        folder(tmp_path)


# --- the cache -----------------------------------------------------------------------------------------------------


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files that were decoded, in any order."""
    from innerloop.data import image_cache

    read: list[Path] = []
    original = image_cache.read_image

    def reading(path: Any, **options: Any) -> np.ndarray:
        read.append(path)
        return original(path, **options)

    monkeypatch.setattr(image_cache, "read_image", reading)
    return read


def only_cache(cache: Path) -> Path:
    (path,) = cache.iterdir()
    return path


def test_images_are_decoded_once_and_mapped(tmp_path: Path, cache: Path, decoded: list[Path]) -> None:
    make_folder(tmp_path / "data")
    first = folder(tmp_path / "data")
    assert len(decoded) == 30
    second = folder(tmp_path / "data")
    assert len(decoded) == 30
    assert isinstance(second.examples, np.memmap)
    assert not second.examples.flags.writeable
    np.testing.assert_array_equal(first.examples, second.examples)
    # An ordinary .npy file, which holds no pickle.
    np.testing.assert_array_equal(np.load(only_cache(cache), allow_pickle=False), second.examples)


def truncate(content: bytearray) -> None:
    del content[-1000:]


def empty(content: bytearray) -> None:
    content.clear()


def flip(position: int) -> Callable[[bytearray], None]:
    def damage(content: bytearray) -> None:
        content[position] ^= 1

    return damage


@pytest.mark.parametrize(
    "damage",
    [truncate, empty, flip(3), flip(5000), flip(-70), flip(-40), flip(-1)],
    ids=["truncated", "empty", "header", "pixel", "last pixel", "fingerprint", "checksum"],
)
def test_a_damaged_cache_is_made_anew(
    tmp_path: Path, cache: Path, decoded: list[Path], damage: Callable[[bytearray], None]
) -> None:
    make_folder(tmp_path / "data")
    expected = np.array(folder(tmp_path / "data", size=12).examples)
    content = bytearray(only_cache(cache).read_bytes())
    damage(content)
    only_cache(cache).write_bytes(content)
    decoded.clear()
    np.testing.assert_array_equal(folder(tmp_path / "data", size=12).examples, expected)
    assert len(decoded) == 30
    folder(tmp_path / "data", size=12)
    assert len(decoded) == 30


@pytest.mark.parametrize("change", ["content", "added", "removed"])
def test_images_that_changed_are_decoded_again(tmp_path: Path, cache: Path, change: str) -> None:
    root = tmp_path / "data"
    make_folder(root)
    folder(root)
    if change == "content":
        save(root / "class7" / "1.png", 255, size=12)
        expected = [140, 255, 142]
    elif change == "added":
        save(root / "class7" / "3.png", 255)
        expected = [140, 141, 142, 255]
    else:
        (root / "class7" / "1.png").unlink()
        expected = [140, 142]
    assert values(folder(root), "class7") == expected
    only_cache(cache)  # the old one has made room


def test_each_size_has_its_cache(tmp_path: Path, cache: Path, decoded: list[Path]) -> None:
    make_folder(tmp_path / "data")
    for _ in range(2):
        for options in ({"size": 8}, {"size": 9}, {"size": 8, "grey": True}):
            folder(tmp_path / "data", **options)
    assert len(decoded) == 90
    assert len(list(cache.iterdir())) == 3


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # the children start no torch threads
def test_builders_at_the_same_time(tmp_path: Path, cache: Path) -> None:
    make_folder(tmp_path / "data", images=20)
    context = multiprocessing.get_context("fork")
    start, sums = context.Barrier(3), context.SimpleQueue()

    def build() -> None:
        start.wait(30)
        sums.put(int(folder(tmp_path / "data").examples.sum()))

    builders = [context.Process(target=build) for _ in range(3)]
    for builder in builders:
        builder.start()
    for builder in builders:
        builder.join(60)
    assert [builder.exitcode for builder in builders] == [0, 0, 0]
    assert {sums.get() for _ in builders} == {int(folder(tmp_path / "data").examples.sum())}
    only_cache(cache)  # and no temporary file is left


def test_the_cache_is_in_the_home_folder_unless_said_otherwise(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cache_folder() == cache
    monkeypatch.delenv("INNERLOOP_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "innerloop"
