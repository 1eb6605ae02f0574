"""What is said of a model: by innerloop.explain, by the command line, and at the end of training."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

import innerloop
from command_line import CommandLine
from innerloop import models
from innerloop.cli.engines import compare
from innerloop.data import get as dataset
from innerloop.training import TrainingSettings
from nets import make_tasks


def said(capsys: pytest.CaptureFixture[str]) -> str:
    return capsys.readouterr().out


def test_a_model_that_lowers(capsys: pytest.CaptureFixture[str]) -> None:
    innerloop.explain(models.SimpleModel())
    text = said(capsys)
    assert text.startswith("SimpleModel lowers to\n\nv1 = flatten(x)")
    assert "# x.view(-1, 784)" in text


def test_a_model_that_does_not(capsys: pytest.CaptureFixture[str]) -> None:
    innerloop.explain(nn.Sequential(nn.Linear(6, 4), nn.Conv2d(2, 2, 3, groups=2)))
    assert said(capsys) == (
        'Sequential does not lower: engine="auto" computes with the torch engine, engine="native" raises.\n\n'
        "layer  1\nwhat   Conv2d\nwhy    groups is 2, and the native engine has groups=1 only\n"
        "to do  use a plain convolution, or engine='torch'\n"
    )


def test_with_tasks_the_plan_names_every_layer(capsys: pytest.CaptureFixture[str]) -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    innerloop.explain(model, tasks=make_tasks((6,)), inner_steps=3)
    text = said(capsys)
    program, sizes, plan = text.partition("83 parameters. A task of 6 + 5 samples of [6] and 3 inner steps: ")
    assert "return v3" in program
    assert sizes
    assert "linear" in plan
    assert "tanh" in plan


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"tasks": make_tasks((5,))}, r"The torch engine computes these tasks: 0 meets samples of shape \[5\]"),
        ({"tasks": make_tasks((6,), out=3)}, "The torch engine computes these tasks: loss is cross_entropy"),
        ({"loss": nn.CrossEntropyLoss(reduction="sum")}, "loss is a function that the native engine does not know"),
    ],
)
def test_what_else_stands_in_the_way(options: dict, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    innerloop.explain(nn.Sequential(nn.Linear(6, 3)).double(), **options)
    assert re.search(words, said(capsys))


def test_the_command_explains_a_model_by_name(innerloop_cli: CommandLine) -> None:
    text = innerloop_cli("explain", "--model", "conv4", "--model-option", "filters=4", "--input-shape", "3,32,32")
    assert "v18 = linear(v17, 17.weight, 17.bias)" in text
    assert "samples of [3, 32, 32]" in text
    assert "mse" not in innerloop_cli("explain", "--model", "sinusoid_mlp")
    assert "or --model" in innerloop_cli("explain", code=2)
    assert "There are: conv4" in innerloop_cli("explain", "--model", "conv5", code=2)


def test_both_engines_are_timed_on_the_same_steps() -> None:
    data = dataset("sinusoid").split("train")
    settings = TrainingSettings(meta_batch_size=4, shots=5, queries=5)
    algorithm = innerloop.get("maml")(models.sinusoid_mlp(), inner_lr=0.01)
    before = [p.detach().clone() for p in algorithm.parameters()]
    sentence = compare(algorithm, data, settings, seconds=0.2)
    assert sentence is not None
    assert re.search(r"A step takes [\d.]+ ms with the native engine .* ms with the torch engine", sentence)
    assert algorithm.engine == "auto"
    assert all(torch.equal(a, b) for a, b in zip(algorithm.parameters(), before, strict=True))
    assert compare(innerloop.get("maml")(models.sinusoid_mlp(), engine="torch"), data, settings) is None
    softplus = nn.Sequential(nn.Linear(1, 4), nn.Softplus(), nn.Linear(4, 1))
    assert compare(innerloop.get("maml")(softplus), data, settings) is None
