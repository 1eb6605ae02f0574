from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

# The tests' tensors are small, and threads that wait for each other cost more than they bring, above all on a machine
# that does something else too. A test about threads asks for them itself. Before torch, which reads it.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

import emulated
from command_line import CommandLine
from innerloop.ops import maml as native

#: Markers of tests that run where an option of that name asks for them.
OPTIONAL = ("slow", "sanitizers")


def pytest_addoption(parser: pytest.Parser) -> None:
    for marker in OPTIONAL:
        parser.addoption(f"--{marker}", action="store_true", help=f"run the tests marked {marker} too")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if isinstance(item, pytest.Function) and is_emulated(item):
            item.add_marker("emulated")
    for marker in OPTIONAL:
        if not config.getoption(f"--{marker}"):
            for item in items:
                if marker in item.keywords:
                    item.add_marker(pytest.mark.skip(reason=f"{marker}: run with --{marker}"))


def is_emulated(test: pytest.Function) -> bool:
    """Whether the CUDA kernels run on the CPU in it: to be left out where they run on a GPU."""
    parameters = test.callspec.params if hasattr(test, "callspec") else {}
    return "emulation" in test.fixturenames or parameters.get("kernels") == "emulated"


@pytest.fixture
def cuda() -> torch.device:
    """A CUDA device; the test is skipped where there is none, and fails there under INNERLOOP_REQUIRE_CUDA=1."""
    if not torch.cuda.is_available():
        if os.environ.get("INNERLOOP_REQUIRE_CUDA") == "1":
            pytest.fail("INNERLOOP_REQUIRE_CUDA=1, but torch sees no CUDA device")
        pytest.skip("no CUDA device")
    return torch.device("cuda")


@pytest.fixture
def emulation() -> Iterator[None]:
    """The CUDA kernels, emulated, in the place of the CPU's. In the memory that torch gives them are NaNs."""
    with emulated.in_place_of_cpu_ops(emulated.operators()):
        torch.use_deterministic_algorithms(True)  # which fills it
        yield
        torch.use_deterministic_algorithms(False)


@pytest.fixture(params=["emulated", "cuda"])
def kernels(request: pytest.FixtureRequest) -> Iterator[str]:
    """The device of tensors for which the CUDA kernels run: the CPU, on which they are emulated, and CUDA."""
    if request.param == "cuda":
        yield str(request.getfixturevalue("cuda"))
    else:
        request.getfixturevalue("emulation")
        yield "cpu"


@pytest.fixture
def innerloop_cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> CommandLine:
    return CommandLine(monkeypatch, capsys)


@pytest.fixture(scope="session")
def maml_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder that a short 5-way training of MAML on glyphs left."""
    return _trained(tmp_path_factory, "maml", "--model", "mlp", "--steps", "30", "--meta-batch-size", "4")


@pytest.fixture(scope="session")
def protonet_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder that a short training of ProtoNet on glyphs left."""
    return _trained(tmp_path_factory, "protonet", "--model-option", "filters=16", "--steps", "100", "--ways", "5")


def _trained(tmp_path_factory: pytest.TempPathFactory, algorithm: str, *options: str) -> Path:
    run = tmp_path_factory.mktemp("runs") / algorithm
    command = [sys.executable, "-m", "innerloop", "train", algorithm, "--data", "glyphs", "--run", str(run)]
    subprocess.run([*command, "--episodes", "100", "--validation-episodes", "20", *options], check=True)
    return run


@pytest.fixture
def force(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes the native engine take the given paths."""
    settings = native.Settings
    return lambda paths: monkeypatch.setattr(native, "Settings", partial(settings, paths=paths))
