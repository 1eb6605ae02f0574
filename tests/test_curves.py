"""The learning curve as a picture."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from innerloop.curves import draw_learning_curve
from innerloop.training import METRICS

STEPS = [{"step": step, "loss": 1 / step, "accuracy": None} for step in range(1, 101)]
VALIDATIONS = [
    {"validation": {"step": step, "mean": step / 100, "ci95": 0.01, "metric": "accuracy"}} for step in (50, 100)
]
BLUE, ORANGE = (31, 119, 180), (255, 127, 14)


@pytest.mark.parametrize(
    ("records", "colours"),
    [(STEPS + VALIDATIONS, {BLUE, ORANGE}), (STEPS[:1], set()), (STEPS, {BLUE}), ([], set())],
    ids=["training and validation", "one step", "training alone", "nothing yet"],
)
def test_the_picture(tmp_path: Path, records: list[dict[str, object]], colours: set[tuple[int, ...]]) -> None:
    (tmp_path / METRICS).write_text("".join(json.dumps(record) + "\n" for record in records))
    draw_learning_curve(tmp_path, tmp_path / "curve.png")
    with Image.open(tmp_path / "curve.png") as picture:
        assert picture.format == "PNG"
        assert picture.size == (1050, 600)
        pixels = np.asarray(picture.convert("RGB")).reshape(-1, 3)
    for colour in colours:
        assert (pixels == colour).all(axis=1).sum() > 100
