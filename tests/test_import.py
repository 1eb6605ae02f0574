"""What `import innerloop` brings in; benchmarks/import_time.py measures what it costs."""

from __future__ import annotations

import subprocess
import sys
from importlib import metadata

import innerloop

PROGRAM = """
import sys
import torch
before = set(sys.modules)
import innerloop
print(*sorted(set(sys.modules) - before), sep="\\n")
"""


def imported() -> list[str]:
    """The modules that importing innerloop adds to those of torch, in a process of its own."""
    done = subprocess.run([sys.executable, "-W", "error", "-c", PROGRAM], capture_output=True, text=True, check=True)
    return done.stdout.split()


def test_version() -> None:
    assert innerloop.__version__ == metadata.version("innerloop")


def test_import_brings_in_no_algorithm_and_nothing_heavy() -> None:
    modules = imported()
    assert "innerloop.tasks" in modules
    too_much = (
        *("innerloop.algorithms.", "innerloop.data", "innerloop.training", "innerloop.cli", "innerloop._native"),
        *("innerloop.bench", "matplotlib", "PIL", "scipy", "rich", "typer", "safetensors", "torchvision"),
    )
    assert [module for module in modules if module.startswith(too_much)] == []
