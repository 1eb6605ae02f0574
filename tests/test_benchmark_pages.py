"""docs/ says what benchmarks/results/ holds."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import report  # noqa: E402

PAGES = dict(report.documents())


@pytest.mark.parametrize("name", PAGES)
def test_page_is_what_the_results_give(name: str) -> None:
    assert (ROOT / "docs" / name).read_text() == PAGES[name], "run .venv/bin/python benchmarks/report.py"


def test_readme_has_the_table() -> None:
    table = "\n".join(report.readme_table(report.PAGES[0].read()))
    assert table in (ROOT / "README.md").read_text(), "take it from .venv/bin/python benchmarks/report.py --readme"
