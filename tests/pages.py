"""The Python that stands in the pages of docs/, to be run.

python tests/pages.py PAGE          runs the page's blocks, the peer's too, and compares the gradients of its sections
"""

from __future__ import annotations

import re
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
PEERS = ("learn2learn", "higher", "torchopt")


def fenced_blocks(page: str, language: str) -> list[str]:
    """The fenced blocks of a page of docs/ in that language, in order."""
    text = (ROOT / "docs" / page).read_text()
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def python_blocks(page: str) -> list[str]:
    return fenced_blocks(page, "python")


def needs_a_peer(block: str) -> bool:
    return re.search(rf"^import ({'|'.join(PEERS)})\b", block, re.MULTILINE) is not None


def run(block: str, page: str, namespace: dict[str, Any]) -> None:
    exec(compile(block, page, "exec"), namespace)


def compare(page: str) -> None:
    """The first block makes ``model``; the meta-gradients that the others leave in it are the same.

    Raises:
        AssertionError: they are not, or there is nothing to compare.
    """
    first, *others = python_blocks(page)
    namespace: dict[str, Any] = {}
    run(first, page, namespace)
    model = namespace["model"]
    found = []
    for block in others:
        model.zero_grad()
        run(block, page, namespace)
        found.append([parameter.grad.clone() for parameter in model.parameters()])
    assert len(found) > 1, f"{page} has nothing to compare"
    size = sum(gradient.norm() for gradient in found[0])
    assert size > 0.01, f"the gradient of {page} is nothing: {size}"
    for gradients in found[1:]:
        torch.testing.assert_close(gradients, found[0], rtol=1e-9, atol=1e-12)


def _import_learn2learn() -> None:
    """Its parts that the page names: the whole imports gym and torchvision."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    from rivals.importing import skip_umbrella

    skip_umbrella("learn2learn", "learn2learn.algorithms")
    algorithms = sys.modules["learn2learn.algorithms"]
    algorithms.MAML = import_module("learn2learn.algorithms.maml").MAML
    sys.modules["learn2learn"].algorithms = algorithms


if __name__ == "__main__":
    (page,) = sys.argv[1:]
    if page == "learn2learn.md":
        _import_learn2learn()
    compare(page)
