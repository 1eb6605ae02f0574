"""docs/ says what benchmarks/results/ holds."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

import accuracy_report
import gradient_family
import learned_optimizer_report
import pictures
import report
from innerloop.bench.rivals import OURS

ROOT = Path(__file__).parents[1]


def results(name: str) -> dict[str, Any]:
    return json.loads((report.RESULTS / name).read_text())


def joined(lines: Iterable[str]) -> str:
    return "\n".join(lines) + "\n"


PAGES = {
    **dict(report.documents()),
    "algorithms.md": joined(accuracy_report.document(results("accuracy.json"))),
    "gradient-family.md": joined(gradient_family.document(results("gradient_family.json"))),
    "learned-optimizer.md": learned_optimizer_report.document(results("learned-optimizer.json")),
}
PICTURES = dict(report.all_pictures())


@pytest.mark.parametrize("name", PAGES)
def test_page_is_what_the_results_give(name: str) -> None:
    assert (ROOT / "docs" / name).read_text() == PAGES[name], "run the script that the page names"


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


def test_memory_is_quoted_as_it_was_measured() -> None:
    """On the pages that are written by hand."""
    races = report.PAGES[0].read()["races"]

    def memory(workload: str, rival: str) -> float:
        return races[workload]["rows"][rival]["peak_megabytes"]

    def a_step(rival: str) -> float:
        return (memory("glyphs-steps100", rival) - memory("glyphs-steps50", rival)) / 50

    def all_of(workload: str) -> dict[str, str]:
        rows = races[workload]["rows"]
        return {rival: f"{memory(workload, rival):,.0f}" for rival, row in rows.items() if "failed" not in row}

    of_50, of_mini = all_of("glyphs-steps50"), all_of("miniimagenet-k5")
    loops = [of_mini[rival] for rival in ("loop", "learn2learn", "higher")]  # of four digits each
    questions = " ".join((ROOT / "docs" / "faq.md").read_text().split())
    for words in (
        f"{of_50[OURS]} MB, where learn2learn's loop takes {of_50['learn2learn']} and `vmap` {of_50['vmap-exact']}",
        f"{of_mini[OURS]} MB, where a torch loop, learn2learn and higher take {min(loops)} to {max(loops)}",
        f"({of_50['innerloop-torch']} and {of_mini['innerloop-torch']} MB there)",
    ):
        assert words in questions
    assert (
        f"adds {a_step(OURS):.2g} MB with the native engine, {a_step('learn2learn'):.2g} with learn2learn, "
        f"{a_step('innerloop-torch'):.2g} with the torch engine and {a_step('vmap-exact'):.2g} with vmap"
    ) in " ".join((ROOT / "docs" / "reliability.md").read_text().split())
