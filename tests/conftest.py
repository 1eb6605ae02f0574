from __future__ import annotations

import os

import pytest
import torch


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="run the tests marked slow too")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--slow"):
        return
    skip = pytest.mark.skip(reason="slow: run with --slow")
    for item in items:
        if "slow" in item.keywords:
            item.add_marker(skip)


@pytest.fixture
def cuda() -> torch.device:
    """A CUDA device; the test is skipped where there is none, and fails there under INNERLOOP_REQUIRE_CUDA=1."""
    if not torch.cuda.is_available():
        if os.environ.get("INNERLOOP_REQUIRE_CUDA") == "1":
            pytest.fail("INNERLOOP_REQUIRE_CUDA=1, but torch sees no CUDA device")
        pytest.skip("no CUDA device")
    return torch.device("cuda")
