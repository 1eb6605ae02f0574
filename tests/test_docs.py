"""The pages of docs/: their Python runs, what they call the same is the same, and none is missing."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn

from innerloop import layer_rules
from innerloop.program import Kind
from innerloop.registry import algorithms, datasets
from pages import ROOT, compare, fenced_blocks, needs_a_peer, python_blocks, run
from rivals import PEERS

#: Pages whose Python runs as it stands, from top to bottom.
RUNNABLE = [
    "evaluation-protocol.md",
    "faq.md",
    "higher.md",
    "learn2learn.md",
    "torch-func.md",
    "writing-a-data-set.md",
    "writing-an-algorithm.md",
]


@pytest.mark.parametrize("page", RUNNABLE)
def test_python_runs(page: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    for registry in (algorithms, datasets):
        monkeypatch.setattr(registry, "_registered", {})
    namespace: dict[str, Any] = {}
    own = [block for block in python_blocks(page) if not needs_a_peer(block)]
    assert own
    for block in own:
        run(block, page, namespace)


def test_the_readme_runs() -> None:
    """Two of its thousand steps."""
    (block,) = python_blocks("../README.md")
    assert "range(1000)" in block
    run(block.replace("range(1000)", "range(2)"), "README.md", {})


@pytest.mark.filterwarnings("default")  # Lightning's, of data loaders without workers and of what it deprecates itself
def test_the_page_on_lightning_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """One epoch of two batches."""
    pytest.importorskip("lightning")
    monkeypatch.chdir(tmp_path)
    (block,) = python_blocks("lightning.md")
    for size, small in (("batches=500", "batches=2"), ("batches=10", "batches=1"), ("max_epochs=6", "max_epochs=1")):
        assert size in block
        block = block.replace(size, small)
    run(block, "lightning.md", {})


@pytest.mark.parametrize(("page", "peer"), [("learn2learn.md", "learn2learn"), ("higher.md", "higher")])
def test_before_and_after_are_the_same(page: str, peer: str) -> None:
    python = PEERS / peer / "bin" / "python"
    if not python.exists():
        pytest.skip(f"{peer} is not there: benchmarks/peers.sh {peer}")
    done = subprocess.run([python, ROOT / "tests" / "pages.py", page], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_torch_func_before_and_after_are_the_same() -> None:
    compare("torch-func.md")


@pytest.mark.slow
def test_tutorial(tmp_path: Path) -> None:
    """Its script, its commands and its Python, as they stand; all letters that it labels are labelled rightly."""
    script, program = python_blocks("tutorial.md")
    (tmp_path / "draw.py").write_text(script)
    (tmp_path / "program.py").write_text(program)
    lines = "".join(fenced_blocks("tutorial.md", "sh")).replace("\\\n", " ")
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    for command in [*lines.splitlines(), "python program.py"]:
        done = subprocess.run(
            command, shell=True, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{command}\n{done.stderr}"
        if command.startswith("innerloop adapt"):
            labels = re.findall(r"^(alpha|lambda|omega)\d\.png +(\w+)", done.stdout, re.MULTILINE)
            assert len(labels) == 9
            assert all(name == label for name, label in labels)
    assert (tmp_path / "result.html").exists()


def test_the_page_on_kernels_quotes_the_sources() -> None:
    sources = "".join(path.read_text() for path in sorted((ROOT / "csrc").glob("*/inner_update.*")))
    quoted = fenced_blocks("adding-a-kernel.md", "cpp")
    assert quoted
    assert all(block in sources for block in quoted)


def test_the_layers_of_the_page_compile(tmp_path: Path) -> None:
    """Its C++, put where the page says, and the lines that it asks for in words."""
    csrc = tmp_path / "csrc"
    shutil.copytree(ROOT / "csrc", csrc)

    def put(text: str, before: str, file: str) -> None:
        source = (csrc / file).read_text()
        assert source.count(before) == 1
        (csrc / file).write_text(source.replace(before, text + before))

    softplus, softplus_case, kind, layout, shape, prelu, made = fenced_blocks("adding-a-layer.md", "cpp")
    put(f"{kind}  softplus = 16,\n", "};\n\nconst char* kind_name", "program/program.h")
    put(softplus, "\n// Calls work(f)", "engine/activation_functions.h")
    put(softplus_case, "    default:  // gelu", "engine/activation_functions.h")
    put(layout, "    case Kind::max_pool:\n      return {1, 0, 6};", "program/program.cpp")
    put(shape, "      case Kind::conv2d: {\n        check_image", "program/program.cpp")
    put(made, "    default:\n      return make_activation", "engine/plan.cpp")
    declaration = re.search(r"^template <class T>\n(.* make_prelu\(.*\)) {$", prelu, re.MULTILINE)
    put(f"template <class T>\n{declaration[1]};\n", "\n}  // namespace innerloop", "engine/layers.h")
    (csrc / "engine" / "prelu.cpp").write_text(prelu)
    for file in ("engine/prelu.cpp", "engine/activation.cpp", "engine/plan.cpp", "program/program.cpp"):
        command = ["c++", "-std=c++20", "-fsyntax-only", "-DINNERLOOP_ISA=baseline", f"-I{csrc}", csrc / file]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


def test_the_layers_of_the_page_have_the_next_numbers_and_rules() -> None:
    softplus, softplus_entry, kind, prelu, prelu_entry, rows = python_blocks("adding-a-layer.md")
    assert kind.split() == ["PRELU", "=", str(max(Kind) + 1)]
    kinds = SimpleNamespace(PRELU=15, SOFTPLUS=16)
    builder = SimpleNamespace(add=lambda kind, input, **options: (kind, input, options), refuse=pytest.fail)
    names: dict[str, Any] = {**vars(layer_rules), "Kind": kinds}
    run(f"{softplus}\n{prelu}\nrules = {{\n{softplus_entry}{prelu_entry}}}", "adding-a-layer.md", names)
    slopes = nn.PReLU(3)
    assert names["rules"][nn.PReLU](builder, slopes, "x") == (15, "x", {"module": slopes})
    assert names["rules"][nn.Softplus](builder, nn.Softplus(2.0), "x") == (16, "x", {"attributes": (2.0,)})
    run(f"{{{rows}}}", "adding-a-layer.md", names | dict.fromkeys(("image", "vector", "data"), lambda layer: layer()))


def test_every_algorithm_has_a_page() -> None:
    own = {point.name for point in entry_points(group="innerloop.algorithms") if point.dist.name == "innerloop"}
    assert own == {page.stem for page in (ROOT / "docs" / "algorithms").glob("*.md")} - {"index"}
