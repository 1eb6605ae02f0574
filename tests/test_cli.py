"""The command line: help for everything, nearest matches, exit codes, and JSON that a script can read."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import typer

import innerloop
from command_line import CommandLine
from innerloop.cli import app, results
from innerloop.registry import algorithms, datasets


def commands() -> Iterator[Any]:
    """Every command there is, the algorithms' training commands included."""
    root = typer.main.get_command(app)
    for name, command in root.commands.items():
        if name == "train":
            for algorithm in algorithms.available():
                yield pytest.param(command.get_command(None, algorithm), id=f"train {algorithm}")
        else:
            yield pytest.param(command, id=name)


@pytest.mark.parametrize("command", list(commands()))
def test_every_command_and_option_says_what_it_is(command: Any) -> None:
    assert command.help
    for parameter in command.params:
        assert len(getattr(parameter, "help", None) or "") > 5, parameter.name


@pytest.mark.parametrize("arguments", [("--help",), ("train", "--help"), ("train", "maml", "-h"), ("adapt", "-h")])
def test_help_is_printed(innerloop_cli: CommandLine, arguments: tuple[str, ...]) -> None:
    assert "Usage: innerloop" in innerloop_cli(*arguments)


def test_an_algorithms_defaults_are_shown(innerloop_cli: CommandLine) -> None:
    printed = innerloop_cli("train", "maml", "--help")
    assert re.search(r"--inner-lr .*α, the step size of the inner loop: .*\[default: 0.4\]", printed)
    assert re.search(r"--steps .*\[default: 3000\]", printed)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("trian",), "Did you mean 'train'?"),
        (("train", "mamll"), "no algorithm is called 'mamll'. Did you mean 'maml'"),
        (("train", "maml", "--dtaa", "glyphs"), "--data"),
        (("train", "maml", "--data", "glyph"), "no data set is called 'glyph'. Did you mean 'glyphs'?"),
        (("train", "maml", "--model", "conv5"), "no model is called 'conv5'. Did you mean 'conv4'?"),
        (("train", "maml", "--data-option", "rotation=no"), "has no option 'rotation'. Did you mean 'rotations'?"),
        (("train", "maml", "--data-option", "rotations=maybe"), "rotations is 'maybe', expected bool"),
        (("train", "maml", "--data-option", "rotations"), "'rotations' is no option of the data set glyphs"),
        (("train", "maml", "--model-option", "downsample=strid"), "Did you mean 'stride'?"),
        (("train", "maml", "--schedule", "cosin"), "'cosine'"),
        (("train", "maml", "--steps", "many"), "Invalid value for '--steps'"),
        (("train", "maml", "--shots", "0"), "shots is 0, expected at least 1"),
        (("train", "protonet", "--ways", "9999"), "no train task of 9999 ways, 1 shots and 5 queries: ways is 9999"),
        (("train", "maml", "--shots", "10"), "no val task of 5 ways, 10 shots and 15 queries: class"),
        (("train", "maml", "--inner-steps", "-1"), "inner_steps is -1"),
        (("train", "maml", "--engine", "nativ"), "nativ"),
        (("train", "protonet", "--temperature", "0"), "temperature is 0.0, expected a positive number"),
        (("train", "maml", "--evaluation-ways", "7"), "maml has a head of 5 ways"),
        (("train", "maml", "--resume"), "--resume needs the folder of the run"),
        (("evaluate",), "Missing argument"),
    ],
)
def test_wrong_usage_is_exit_code_2_and_says_what_is_right(
    innerloop_cli: CommandLine,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    printed = innerloop_cli(*arguments, code=2)
    assert message in printed
    assert "Traceback" not in printed
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("evaluate", "RUN"), "RUN is no training run: it has no config.json"),
        (("adapt", "RUN", "--support", "a", "--query", "b"), "RUN is no training run"),
        (("train", "maml", "--resume", "--run", "RUN"), "RUN is no training run"),
    ],
)
def test_what_fails_is_exit_code_1(innerloop_cli: CommandLine, arguments: tuple[str, ...], message: str) -> None:
    assert message in innerloop_cli(*arguments, code=1)


def test_ctrl_c_is_exit_code_130(innerloop_cli: CommandLine, maml_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(results, "evaluate", interrupted)
    innerloop_cli("evaluate", maml_run, code=130)


def test_a_run_that_is_there_is_neither_overwritten_nor_resumed_otherwise(
    innerloop_cli: CommandLine, maml_run: Path
) -> None:
    before = {path.name: path.read_bytes() for path in maml_run.iterdir()}
    assert "is not empty" in innerloop_cli("train", "maml", "--run", maml_run, code=1)
    assert "--steps cannot be given with --resume" in innerloop_cli(
        "train", "maml", "--run", maml_run, "--resume", "--steps", "40", code=2
    )
    assert "was trained with 'maml': innerloop train maml" in innerloop_cli(
        "train", "protonet", "--run", maml_run, "--resume", code=2
    )
    assert {path.name: path.read_bytes() for path in maml_run.iterdir()} == before


def test_a_run_folder_tells_everything(maml_run: Path) -> None:
    config = json.loads((maml_run / "config.json").read_text())
    assert config["algorithm"]["name"] == "maml"
    assert config["algorithm"]["distribution"] == "innerloop"
    assert config["algorithm"]["version"] == config["versions"]["innerloop"]
    assert config["algorithm"]["options"]["inner_lr"] == 0.4
    assert config["model"]["name"] == "mlp"
    assert config["data"]["name"] == "glyphs"
    assert config["training"]["steps"] == 30
    assert config["training"]["meta_batch_size"] == 4
    assert (config["seed"], config["bn"]) == (0, "none")
    assert config["versions"]["torch"] == torch.__version__
    test = json.loads((maml_run / "test.json").read_text())
    assert (test["ways"], test["shots"], test["episodes"], test["inner_steps"]) == (5, 1, 100, 1)
    assert {path.name for path in maml_run.iterdir()} == {
        "config.json", "metrics.jsonl", "latest.safetensors", "latest.previous.safetensors", "best.safetensors",
        "test.json", "learning_curve.png",
    }  # fmt: skip


def test_evaluate_repeats_the_runs_own_test(innerloop_cli: CommandLine, maml_run: Path) -> None:
    record = json.loads(innerloop_cli("evaluate", maml_run, "--episodes", 100, "--json"))
    assert record.pop("run") == str(maml_run)
    assert record.pop("split") == "test"
    assert record == json.loads((maml_run / "test.json").read_text())
    printed = innerloop_cli("evaluate", maml_run, "--episodes", 100)
    assert printed == (
        f"maml on glyphs (test): accuracy {100 * record['mean']:.2f} ± {100 * record['ci95']:.2f} % "
        "(5-way 1-shot, 100 episodes, inner steps 1, BatchNorm none)\n"
    )


def test_evaluate_with_other_tasks(innerloop_cli: CommandLine, protonet_run: Path, maml_run: Path) -> None:
    options = ("--split", "val", "--shots", 5, "--queries", 3, "--episodes", 20, "--seed", 4)
    record = json.loads(innerloop_cli("evaluate", protonet_run, "--ways", 8, *options, "--json"))
    expected = {"split": "val", "ways": 8, "shots": 5, "queries": 3, "episodes": 20, "seed": 4}
    assert {key: record[key] for key in expected} == expected
    assert (record["inner_steps"], record["bn"]) == (None, "running")
    assert "inner steps 3" in innerloop_cli("evaluate", maml_run, "--inner-steps", 3, "--episodes", 10)
    message = innerloop_cli("evaluate", protonet_run, "--inner-steps", 3, code=1)
    assert "ProtoNet has no inner loop" in message
    assert "ways" in innerloop_cli("evaluate", maml_run, "--ways", 0, code=1)


def test_what_is_installed_as_json(innerloop_cli: CommandLine) -> None:
    facts = json.loads(innerloop_cli("info", "--json"))
    assert facts["torch"].startswith(torch.__version__)
    assert {"innerloop", "CPU library", "CPU instruction set", "CUDA built", "CUDA usable", "threads"} <= facts.keys()
    for command, registry in (("algorithms", algorithms), ("datasets", datasets)):
        rows = json.loads(innerloop_cli(command, "--json"))
        assert {row["name"] for row in rows} == set(registry.available())
        for row in rows:
            assert row["distribution"] == "innerloop"
            assert row["summary"]
            assert row["state"] == "ok", row


def test_paths_in_info_are_whole(innerloop_cli: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    assert str(innerloop._library.CPU_LIBRARY) in innerloop_cli("info")
