"""Labelling a folder of images: what the command says, and the page as a browser shows it."""

from __future__ import annotations

import html
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import innerloop
from command_line import CommandLine
from innerloop.adaptation import label_images, shown_name
from innerloop.data.class_dataset import ClassDataset

NAMES = ["alpha & <b>co", 'quoted "x"', "[red]markup", "plain", "ünïcode"]


def save(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


@pytest.fixture
def letters(tmp_path: Path) -> Path:
    """Five letters of the test scripts, black on white and larger than the training data's: support/, query/."""
    dataset = innerloop.data.get("glyphs").split("test")
    for name, index in zip(NAMES, dataset.classes[3:48:9], strict=True):
        for number, glyph in enumerate(dataset.class_examples(int(index))[:8]):
            enlarged = (255 - glyph).repeat(3, axis=0).repeat(4, axis=1)
            part = f"support/{name}" if number < 3 else "query"
            save(tmp_path / part / f"{NAMES.index(name)}-{number}.png", enlarged)
    return tmp_path


def test_labels_as_json(innerloop_cli: CommandLine, protonet_run: Path, letters: Path) -> None:
    printed = innerloop_cli(
        "adapt", protonet_run, "--support", letters / "support", "--query", letters / "query", "--json"
    )
    record = json.loads(printed)
    assert record["inverted"] is True
    assert record["classes"] == dict.fromkeys(sorted(NAMES), 3)
    assert [Path(image["file"]).name for image in record["images"]] == sorted(os.listdir(letters / "query"))
    right = [image["label"] == NAMES[int(Path(image["file"]).name[0])] for image in record["images"]]
    assert np.mean(right) > 0.8
    for image in record["images"]:
        assert image["label"] != image["second"]
        assert 1 >= image["confidence"] >= image["second_confidence"] >= 0


def test_labels_as_a_table(innerloop_cli: CommandLine, maml_run: Path, letters: Path) -> None:
    printed = innerloop_cli("adapt", maml_run, "--support", letters / "support", "--query", letters / "query")
    lines = printed.splitlines()
    assert lines[0].split() == ["file", "label", "confidence", "second", "choice"]
    assert len([line for line in lines if re.search(r"\d-\d\.png +.+ \d+\.\d % +.+ \(\d+\.\d %\)", line)]) == 25
    assert "[red]markup" in printed
    assert "Light and dark were exchanged" in printed


def test_a_head_takes_as_many_classes_as_it_has_outputs(
    innerloop_cli: CommandLine, maml_run: Path, protonet_run: Path, letters: Path
) -> None:
    shutil.rmtree(letters / "support" / "plain")
    folders = ("--support", letters / "support", "--query", letters / "query")
    message = innerloop_cli("adapt", maml_run, *folders, code=1)
    assert "4 classes, but the run's MAML has a head of 5: give 5, or train with --ways 4" in message
    innerloop_cli("adapt", protonet_run, *folders)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda root: shutil.rmtree(root / "query"), r"there is no folder .*query"),
        (lambda root: [file.unlink() for file in (root / "query").iterdir()], r"query has no image file"),
        (lambda root: (root / "support" / "empty").mkdir(), r"empty has no image file"),
        (lambda root: (root / "query" / "0-3.png").write_text("text"), r"0-3\.png cannot be read as an image"),
        (lambda root: [shutil.rmtree(root / "support" / name) for name in NAMES[1:]], r"one class, 'alpha & <b>co'"),
    ],
    ids=["no folder", "no query", "no support", "no image", "one class"],
)
def test_what_is_wrong_with_the_folders_is_said(
    innerloop_cli: CommandLine, protonet_run: Path, letters: Path, spoil: object, message: str
) -> None:
    spoil(letters)
    folders = ("--support", letters / "support", "--query", letters / "query")
    assert re.search(message, innerloop_cli("adapt", protonet_run, *folders, code=1))


def pixel_learner() -> innerloop.Algorithm:
    return innerloop.get("protonet")(nn.Flatten(), metric="cosine").eval()


def image_data(background: int, channels: int = 1) -> ClassDataset:
    """Training data of 4 × 4 images with a background and a spot of the other brightness in the middle."""
    images = np.full((12, 4, 4, channels), background, np.uint8)
    images[:, 1:3, 1:3] = 255 - background
    return ClassDataset(images if channels == 3 else images[..., 0], [4] * 3, list("abc"), {"train": np.arange(3)})


@pytest.mark.parametrize(
    ("trained", "given", "invert", "inverted"),
    [
        (0, 255, "auto", True),
        (255, 0, "auto", True),
        (0, 0, "auto", False),
        (255, 255, "auto", False),
        (120, 255, "auto", False),
        (0, 140, "auto", True),
        (0, 255, "no", False),
        (0, 0, "yes", True),
    ],
)
def test_inversion(tmp_path: Path, trained: int, given: int, invert: str, inverted: bool) -> None:
    for name in ("support/a/1.png", "support/b/1.png", "query/1.png"):
        save(tmp_path / name, np.full((4, 4), given, np.uint8))
    seen = []
    learner = pixel_learner()
    learner.model.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    labelling = label_images(learner, image_data(trained), tmp_path / "support", tmp_path / "query", invert=invert)
    assert labelling.inverted is inverted
    expected = (255 - given if inverted else given) / 255
    for x in seen:
        torch.testing.assert_close(x, torch.full_like(x, expected))


def test_colour_data_sees_colour_and_is_never_inverted_unasked(tmp_path: Path) -> None:
    red, blue = (np.full((9, 7, 3), colour, np.uint8) for colour in ([230, 200, 200], [200, 200, 230]))
    for name, pixels in {"support/red/1.png": red, "support/blue/1.png": blue, "query/r.png": red}.items():
        save(tmp_path / name, pixels)
    labelling = label_images(pixel_learner(), image_data(0, 3), tmp_path / "support", tmp_path / "query")
    assert [image.label for image in labelling.images] == ["red"]
    assert not labelling.inverted


def test_many_queries_are_judged_in_even_parts(tmp_path: Path) -> None:
    for name in ("support/dark/1.png", "support/light/1.png"):
        save(tmp_path / name, np.full((4, 4), 255 * ("light" in name), np.uint8) - np.eye(4, dtype=np.uint8))
    for number in range(257):
        shutil.copy(tmp_path / "support" / ("light", "dark")[number % 2] / "1.png", tmp_path / f"{number:03d}.png")
    learner = pixel_learner()
    sizes = []
    learner.model.register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0])))
    labelling = label_images(learner, image_data(128), tmp_path / "support", tmp_path)
    assert len(labelling.images) == 257
    assert sizes == [2, 129, 128]


def test_a_regression_run_labels_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"samples of shape \(1,\), expected grey or colour images with classes"):
        label_images(pixel_learner(), innerloop.data.get("sinusoid"), tmp_path, tmp_path)


def test_a_name_of_any_bytes_can_be_shown() -> None:
    assert shown_name(Path(os.fsdecode(b"caf\xe9.png"))) == "caf�.png"


@pytest.fixture
def browser() -> str:
    """A headless browser's command; the test is skipped without one, and fails under INNERLOOP_REQUIRE_BROWSER=1."""
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        if os.environ.get("INNERLOOP_REQUIRE_BROWSER") == "1":
            pytest.fail("INNERLOOP_REQUIRE_BROWSER=1, but there is no chromium")
        pytest.skip("no chromium")
    return found


# Run by the browser after the page has loaded: what a reader sees, put where --dump-dom shows it.
LOOK = """<script>addEventListener("load", () => {
  const seen = {
    text: document.body.innerText,
    images: [...document.images].map(image => [image.alt, image.naturalWidth, image.getBoundingClientRect().width]),
    outside: performance.getEntriesByType("resource").map(entry => entry.name).filter(n => !n.startsWith("data:")),
    overflow: document.documentElement.scrollWidth > innerWidth,
  };
  document.documentElement.dataset.seen = JSON.stringify(seen);
});</script>"""


def test_the_page_in_a_browser(
    innerloop_cli: CommandLine, protonet_run: Path, letters: Path, browser: str, tmp_path: Path
) -> None:
    folders = ("--support", letters / "support", "--query", letters / "query")
    printed = innerloop_cli("adapt", protonet_run, *folders, "--report", tmp_path / "report.html", "--json")
    shutil.rmtree(letters / "support")  # the page must not need them
    shutil.rmtree(letters / "query")
    page = tmp_path / "page.html"
    page.write_text((tmp_path / "report.html").read_text(encoding="utf-8") + LOOK, encoding="utf-8")
    profile = f"--user-data-dir={tmp_path / 'profile'}"
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", profile, "--window-size=900,1400", "--dump-dom"]
    shown = subprocess.run([*command, page.as_uri()], capture_output=True, text=True, check=True, timeout=120).stdout
    match = re.search(r'data-seen="([^"]*)"', shown)
    assert match is not None, shown[:500]
    seen = json.loads(html.unescape(match[1]))

    assert len(seen["images"]) == 15 + 25
    for name, natural_width, shown_width in seen["images"]:
        assert natural_width > 0, name
        assert shown_width > 30, name
    assert seen["outside"] == []
    assert not seen["overflow"]
    for image in json.loads(printed)["images"]:
        name = Path(image["file"]).name
        percent = f"{100 * image['confidence']:.0f} %"
        second = f"else {image['second']}, {100 * image['second_confidence']:.0f} %"
        words = (percent, image["label"], second, name)
        assert re.search(r"\s+".join(map(re.escape, words)), seen["text"]), words
    for name in NAMES:
        assert f"{name}\n" in seen["text"]
