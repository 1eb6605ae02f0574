"""docs/ says what benchmarks/results/ holds."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import pictures  # noqa: E402
import report  # noqa: E402

PAGES = dict(report.documents())
PICTURES = dict(report.all_pictures())


@pytest.mark.parametrize("name", PAGES)
def test_page_is_what_the_results_give(name: str) -> None:
    assert (ROOT / "docs" / name).read_text() == PAGES[name], "run .venv/bin/python benchmarks/report.py"


@pytest.mark.parametrize("name", PICTURES)
def test_picture_shows_the_results(name: str) -> None:
    assert pictures.digest_in(ROOT / "docs" / name) == pictures.digest(PICTURES[name]), "run benchmarks/report.py"


def test_a_picture_is_drawn_and_knows_its_data(tmp_path: Path) -> None:
    bars = pictures.Bars({"net": [pictures.Bar("loop", "torch loop", 3.0, "3.00")]}, "ms")
    more = pictures.Bars({"net": [pictures.Bar("loop", "torch loop", 4.0, "3.00")]}, "ms")
    lines = pictures.Lines({"net": [pictures.Line("jax-loop", "JAX", [(1, 2.0), (10, 3.0)])]}, "T", "ms")
    for name, picture in (("bars.svg", bars), ("lines.svg", lines)):
        pictures.write(picture, tmp_path / name)
        assert pictures.digest_in(tmp_path / name) == pictures.digest(picture)
    assert "torch loop" in (tmp_path / "bars.svg").read_text()
    assert pictures.digest(bars) != pictures.digest(more)


def test_readme_has_the_table_and_the_picture() -> None:
    table = "\n".join(report.readme_table(report.PAGES[0].read()))
    assert table in (ROOT / "README.md").read_text(), "take it from .venv/bin/python benchmarks/report.py --readme"
    assert f"](docs/{report.file_of(report.PAGES[0], report.README)})" in (ROOT / "README.md").read_text()
