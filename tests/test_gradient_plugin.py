"""examples/hf_maml, a gradient-based method written with the primitives: what it computes, and as its users have it."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import innerloop
from nets import assert_close, conv_module, make, make_tasks, mlp_module, ragged
from test_plugin import innerloop_cli, install, line_with

ROOT = Path(__file__).parents[1]
PLUGIN = ROOT / "examples" / "hf_maml"
SOURCE = PLUGIN / "src" / "innerloop_hf_maml.py"


def module() -> ModuleType:
    spec = importlib.util.spec_from_file_location("innerloop_hf_maml", SOURCE)
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


@pytest.mark.parametrize("bn", ["transductive", "support", "running"])
@pytest.mark.parametrize(("build", "shape", "out"), [(mlp_module, (6,), 3), (conv_module, (2, 4, 4), None)])
def test_it_is_maml_with_one_step(build: Any, shape: tuple[int, ...], out: int | None, bn: str) -> None:
    tasks = ragged(make_tasks(shape, support=9, out=out))
    maml = innerloop.get("maml")(make(build), inner_lr=0.3, inner_steps=1, bn=bn, engine="torch")
    hf_maml = module().HFMAML(make(build), inner_lr=0.3, bn=bn)
    expected, result = maml(tasks), hf_maml(tasks)
    assert_close(result.task_losses, expected.task_losses, "losses")
    expected.loss.backward()
    result.loss.backward()
    for (name, ours), theirs in zip(hf_maml.model.named_parameters(), maml.model.parameters(), strict=True):
        if name != "0.bias" or build is mlp_module or bn == "running":  # before BatchNorm: rounding noise
            assert_close(ours.grad, theirs.grad, name)
    learners = [algorithm.adapt(tasks.support_x[1], tasks.support_y[1]) for algorithm in (hf_maml, maml)]
    assert_close(*(learner(tasks.query_x[1]) for learner in learners), "outputs")


def test_the_document_shows_the_distribution_as_it_is() -> None:
    blocks = re.findall(r"```(\w+)\n(.*?)```", (ROOT / "docs" / "gradient-methods.md").read_text(), re.DOTALL)
    assert ("python", SOURCE.read_text()) in blocks
    assert ("toml", (PLUGIN / "pyproject.toml").read_text()) in blocks


def test_the_primitives_of_the_document_are_those_of_the_module() -> None:
    text = (ROOT / "docs" / "gradient-methods.md").read_text()
    public = {
        name
        for name, value in vars(innerloop.primitives).items()
        if callable(value) and not name.startswith("_") and value.__module__ == "innerloop.primitives"
    }
    assert set(re.findall(r"^\| `(\w+)\(", text, re.MULTILINE)) == public


def test_installed_listed_trained_and_evaluated(tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> None:
    site = install(PLUGIN, tmp_path_factory)
    line = line_with(innerloop_cli(site, "algorithms"), "hf_maml")
    for part in ("innerloop-hf-maml", "0.1.0", "Fallah et al. 2020", "ok"):
        assert part in line
    run = tmp_path / "run"
    small = ("--model-option", "filters=4", "--steps", "3", "--episodes", "10", "--validation-episodes", "4")
    innerloop_cli(site, "train", "hf_maml", "--data", "glyphs", "--inner-lr", "0.2", "--run", str(run), *small)
    assert json.loads((run / "config.json").read_text())["algorithm"]["options"]["inner_lr"] == 0.2
    record = json.loads(innerloop_cli(site, "evaluate", str(run), "--episodes", "10", "--json"))
    assert record["bn"] == "transductive"
