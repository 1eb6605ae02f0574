"""The native sources compile for a CPU that is not x86-64, without a warning."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
COMPILER = shutil.which("aarch64-linux-gnu-g++")
FLAGS = ["-std=gnu++20", "-O0", "-Wall", "-Wextra", "-Wpedantic", "-Werror", "-Wno-psabi"]
SOURCES = sorted(path for folder in ("kernels", "engine", "sampler") for path in (ROOT / "csrc" / folder).glob("*.cpp"))


@pytest.mark.skipif(COMPILER is None, reason="no cross compiler (Debian: g++-aarch64-linux-gnu)")
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_compiles_for_aarch64(source: Path, tmp_path: Path) -> None:
    assert COMPILER is not None
    command = [COMPILER, *FLAGS, "-DINNERLOOP_ISA=baseline", f"-I{ROOT / 'csrc'}", "-c", str(source)]
    done = subprocess.run([*command, "-o", str(tmp_path / "object.o")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
