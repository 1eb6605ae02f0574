"""The pages of docs/: their Python runs, what they call the same is the same, and none is missing."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import entry_points
from typing import Any

import pytest

from pages import ROOT, compare, needs_a_peer, python_blocks, run

#: Pages whose Python runs as it stands, from top to bottom.
RUNNABLE = ["learn2learn.md", "higher.md", "torch-func.md", "evaluation-protocol.md"]


@pytest.mark.parametrize("page", RUNNABLE)
def test_python_runs(page: str) -> None:
    namespace: dict[str, Any] = {}
    own = [block for block in python_blocks(page) if not needs_a_peer(block)]
    assert own
    for block in own:
        run(block, page, namespace)


@pytest.mark.parametrize(("page", "peer"), [("learn2learn.md", "learn2learn"), ("higher.md", "higher")])
def test_before_and_after_are_the_same(page: str, peer: str) -> None:
    if not (ROOT / ".cache" / "peers" / peer / peer).is_dir():
        pytest.skip(f"{peer} is not there: benchmarks/peers.sh {peer}")
    done = subprocess.run(
        [sys.executable, ROOT / "tests" / "pages.py", page, peer], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_torch_func_before_and_after_are_the_same() -> None:
    compare("torch-func.md")


def test_every_algorithm_has_a_page() -> None:
    own = {point.name for point in entry_points(group="innerloop.algorithms") if point.dist.name == "innerloop"}
    assert own == {page.stem for page in (ROOT / "docs" / "algorithms").glob("*.md")} - {"index"}
