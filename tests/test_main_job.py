"""The main jobs, shortened where they are long: the built-in data is learned from scratch as the README says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from command_line import CommandLine

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("algorithm", "options", "at_least"),
    [
        ("protonet", (), 0.93),
        ("maml", ("--steps", 600), 0.84),  # 3,000 steps, the default, reach 94 %
    ],
)
def test_letters_of_scripts_never_seen(
    innerloop_cli: CommandLine, tmp_path: Path, algorithm: str, options: tuple[object, ...], at_least: float
) -> None:
    innerloop_cli("train", algorithm, "--data", "glyphs", "--run", tmp_path / "run", *options)
    test = json.loads((tmp_path / "run" / "test.json").read_text())
    assert (test["ways"], test["shots"], test["episodes"]) == (5, 1, 600)
    assert test["mean"] > at_least


def test_sinusoids(innerloop_cli: CommandLine, tmp_path: Path) -> None:
    """2,000 steps of the 10,000 that the README's command takes."""
    run = tmp_path / "run"
    innerloop_cli(
        "train", "maml", "--data", "sinusoid", "--shots", 10, "--queries", 10, "--inner-lr", 0.01,
        "--meta-batch-size", 25, "--clip", 0, "--steps", 2000, "--validate-every", 1000, "--run", run,
    )  # fmt: skip
    errors = {
        steps: json.loads(innerloop_cli("evaluate", run, "--inner-steps", steps, "--json"))["mean"]
        for steps in (0, 1, 10)
    }
    assert errors[10] < errors[1] < 1.3 < errors[0]
