"""A first Linear layer by low-rank updates, forced, against the torch engine in float64; its plain twin beside it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from innerloop import torch_engine
from innerloop.explanation import explanation
from innerloop.inner_loop import InnerLoop
from nets import assert_close, make, make_tasks, ragged
from test_lanes import OPTIONS, by_native, random_rates, run

LOW_RANK, PLAIN = (0, 2, 0, 0, 0, 2), (0, 0, 0, 0, 0, 0)


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 5), nn.ReLU(), nn.Linear(5, 3))


def assert_agrees(
    force: Any,
    arguments: dict[str, Any],
    model: nn.Module,
    per_task: str | None = None,
    shape: tuple[int, ...] = (6,),
    count: int = 3,
) -> None:
    rates = arguments["inner_lr"]
    for rate in rates.values() if isinstance(rates, dict) else [rates]:
        if isinstance(rate, torch.Tensor):
            rate.requires_grad_()
    tasks = ragged(make_tasks(shape, tasks=count))
    inner = InnerLoop.create(model, **arguments)
    expected = run(torch_engine.meta_result, model, tasks, inner, per_task)
    for paths in (LOW_RANK, PLAIN):
        force(paths)
        for (what, actual), (_, value) in zip(run(by_native, model, tasks, inner, per_task), expected, strict=True):
            assert_close(actual, value, f"{what} by {paths}")


@pytest.mark.parametrize("options", [*OPTIONS, "the weight alone", "no bias"])
def test_every_option(force: Any, options: str) -> None:
    torch.manual_seed(0)
    model = make(network)
    if options == "the weight alone":
        arguments = {"inner_lr": {"0.weight": torch.rand(2).double()}, "inner_steps": 2, "support_weight": 0.7}
    elif options == "no bias":
        model[0] = nn.Linear(6, 7, bias=False).double()
        arguments = {"inner_lr": random_rates(model, 2), "inner_steps": 2}
    else:
        arguments = OPTIONS[options](model)
    assert_agrees(force, arguments, model)


@pytest.mark.parametrize("per_task", ["0.weight", "0.bias", "2.weight"])
def test_parameters_of_each_task(force: Any, per_task: str) -> None:
    model = make(network)
    assert_agrees(force, OPTIONS["step weights"](model), model, per_task)


# From 16 tasks on a worker sums up several before it adds them to the others': here two, and in the last chunk one.
@pytest.mark.parametrize("per_task", [None, "0.weight"], ids=["shared", "a weight for each task"])
def test_many_tasks(force: Any, per_task: str | None) -> None:
    model = make(network)
    assert_agrees(force, OPTIONS["step weights"](model), model, per_task, count=17)


def test_the_same_bits_on_two_threads(force: Any) -> None:
    model, tasks = make(network), make_tasks((6,), tasks=35)
    inner = InnerLoop.create(model, inner_lr=random_rates(model, 2), inner_steps=2)
    force(LOW_RANK)
    found = []
    for threads in (2, 1):
        torch.set_num_threads(threads)
        found.append(run(by_native, model, tasks, inner, None))
    for (what, one), (_, two) in zip(*found, strict=True):
        assert torch.equal(one, two), what


def test_flat_images(force: Any) -> None:
    model = make(lambda: nn.Sequential(nn.Flatten(), *network()))
    assert_agrees(force, {"inner_lr": 0.3, "inner_steps": 2}, model, shape=(1, 2, 3))


def test_without_gradients(force: Any) -> None:
    model, tasks = make(network), ragged(make_tasks((6,)))
    inner = InnerLoop.create(model, inner_lr=0.3, inner_steps=3, step_weights=[0.5, -0.2, 0.3, 1.0])
    found = []
    for paths in (LOW_RANK, PLAIN):
        force(paths)
        with torch.no_grad():
            result = by_native(model, dict(model.named_parameters()), tasks, inner)
        found.append((result.task_losses, result.logits))
    for low_rank, plain in zip(*found, strict=True):
        assert_close(low_rank, plain, "without gradients")


@pytest.mark.parametrize(("inputs", "hidden", "chosen"), [(200, 128, True), (6, 3, False)])
def test_it_is_chosen_where_it_pays(inputs: int, hidden: int, chosen: bool) -> None:
    model = nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, 3)).double()
    assert ("low-rank updates" in explanation(model, tasks=make_tasks((inputs,)), inner_steps=1)) == chosen
