"""The examples of the docstrings run, and print what they say."""

from __future__ import annotations

import doctest
from importlib import import_module
from pathlib import Path

import pytest
import torch

import innerloop

PACKAGE = Path(innerloop.__file__).parent
SOURCES = [path for path in sorted(PACKAGE.rglob("*.py")) if ">>> " in path.read_text()]


def module_of(source: Path) -> str:
    return ".".join(source.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")


@pytest.mark.parametrize("module", [module_of(source) for source in SOURCES])
def test_examples_print_what_they_say(module: str) -> None:
    """Each begins with the two names that docs/api/index.md gives it."""
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    names = {"torch": torch, "innerloop": innerloop}
    for example in doctest.DocTestFinder(exclude_empty=True).find(import_module(module), globs=names):
        torch.manual_seed(0)
        runner.run(example)
    assert runner.tries
    assert not runner.failures
