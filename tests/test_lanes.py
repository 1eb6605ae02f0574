"""The lanes executor, forced, and its plain twin, against the torch engine in float64: every feature of the inner loop
on chains of Linear layers."""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import innerloop
from innerloop import TaskBatch, engine, native_engine, torch_engine
from innerloop.inner_loop import InnerLoop
from innerloop.ops import maml as native
from nets import assert_close, make, make_tasks, ragged

LANES, BLOCKS = (2, 0, 0, 0, 0, 0), (0, 0, 0, 0, 0, 0)


def chain(*activations: nn.Module, bias: bool = True) -> nn.Module:
    """6 → 7 → 5 → 3, sizes that fill no tile of the products, with an activation after each of the first layers."""
    sizes = (6, 7, 5, 3)
    layers: list[nn.Module] = []
    for index, (inputs, outputs) in enumerate(pairwise(sizes)):
        layers.append(nn.Linear(inputs, outputs, bias=bias))
        layers.extend(activations[index : index + 1])
    return nn.Sequential(*layers)


def random_rates(model: nn.Module, *leading: int, elements: bool = False) -> dict[str, Tensor]:
    return {
        name: 0.1 + 0.2 * torch.rand((*leading, *(p.shape if elements else ())), dtype=torch.float64)
        for name, p in model.named_parameters()
    }


# The inner loop's settings for a model; rates are learned where they are tensors.
OPTIONS: dict[str, Any] = {
    "one step": lambda model: {"inner_lr": 0.3},
    "no step": lambda model: {"inner_lr": 0.3, "inner_steps": 0, "support_weight": 0.7},
    "three steps": lambda model: {"inner_lr": 0.3, "inner_steps": 3},
    "first order": lambda model: {"inner_lr": torch.tensor(0.3).double(), "inner_steps": 3, "first_order": True},
    "step weights": lambda model: {
        "inner_lr": 0.3, "inner_steps": 3, "step_weights": [0.5, -0.2, 0.0, 1.0], "support_weight": 0.7,
    },
    "α": lambda model: {"inner_lr": torch.tensor(0.3).double(), "inner_steps": 2},
    "α of each step": lambda model: {"inner_lr": 0.1 + 0.1 * torch.rand(3).double(), "inner_steps": 3},
    "α of each parameter and step": lambda model: {"inner_lr": random_rates(model, 2), "inner_steps": 2},
    "α of each element": lambda model: {"inner_lr": random_rates(model, elements=True), "inner_steps": 2},
    "α of each element and step": lambda model: {"inner_lr": random_rates(model, 3, elements=True), "inner_steps": 3},
    "the head alone": lambda model: {
        "inner_lr": 0.3, "inner_steps": 2, "adapt": ["4"], "step_weights": [0.5, 0.2, 1.0], "support_weight": 0.7,
    },
    "a middle weight alone": lambda model: {"inner_lr": 0.3, "inner_steps": 2, "adapt": ["2.weight"]},
    "the body alone": lambda model: {"inner_lr": 0.3, "inner_steps": 2, "adapt": ["0", "2"], "support_weight": 0.7},
}  # fmt: skip

NETWORKS: dict[str, Any] = {
    "relu, tanh": partial(chain, nn.ReLU(), nn.Tanh()),
    "sigmoid, leaky relu, relu": partial(chain, nn.Sigmoid(), nn.LeakyReLU(0.1), nn.ReLU()),
    "gelu, tanh gelu, sigmoid": partial(chain, nn.GELU(), nn.GELU(approximate="tanh"), nn.Sigmoid()),
    "no bias": partial(chain, nn.ReLU(), nn.Tanh(), bias=False),
}


def run(meta_result: Any, model: nn.Module, tasks: TaskBatch, inner: InnerLoop, per_task: str | None) -> list[Any]:
    """[(what, tensor)]: results and gradients."""
    torch.manual_seed(3)
    parameters = {name: p.detach().clone() for name, p in model.named_parameters()}
    if per_task:
        noise = torch.randn(tasks.num_tasks, *parameters[per_task].shape, dtype=torch.float64)
        parameters[per_task] = parameters[per_task] + 0.1 * noise
    for parameter in parameters.values():
        parameter.requires_grad_()
    learned = {id(rate.value): rate.value for rate in inner.rates.values() if rate.value.requires_grad}
    result = meta_result(model, parameters, tasks, inner)
    wanted = [*parameters.items(), *(("α", rate) for rate in learned.values())]
    gradients = torch.autograd.grad(result.loss, [tensor for _, tensor in wanted], allow_unused=True)
    found = [("loss", result.loss), ("task losses", result.task_losses), ("outputs", result.logits)]
    return [*found, *((name, gradient) for (name, _), gradient in zip(wanted, gradients, strict=True))]


def by_native(model: nn.Module, parameters: dict[str, Tensor], tasks: TaskBatch, inner: InnerLoop) -> Any:
    return engine.meta_result(model, tasks, inner, parameters, engine="native")


def assert_agrees(
    force: Any, network: str, options: str, tasks: TaskBatch, per_task: str | None = None, **more: Any
) -> None:
    torch.manual_seed(0)
    model = make(NETWORKS[network])
    arguments = {**OPTIONS[options](model), **more}
    given = arguments["inner_lr"]
    for rate in given.values() if isinstance(given, dict) else [given]:
        if isinstance(rate, Tensor):
            rate.requires_grad_()
    inner = InnerLoop.create(model, **arguments)
    expected = run(torch_engine.meta_result, model, tasks, inner, per_task)
    for paths in (LANES, BLOCKS):
        force(paths)
        for (what, actual), (_, value) in zip(run(by_native, model, tasks, inner, per_task), expected, strict=True):
            assert_close(actual, value, f"{what} by {paths}")


@pytest.mark.parametrize("options", OPTIONS)
def test_every_option(force: Any, options: str) -> None:
    assert_agrees(force, "relu, tanh", options, ragged(make_tasks((6,), tasks=5)))


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("options", ["three steps", "a middle weight alone"])
def test_every_activation(force: Any, network: str, options: str) -> None:
    if network == "no bias" and options == "a middle weight alone":
        options = "the body alone"
    assert_agrees(force, network, options, make_tasks((6,), tasks=3))


@pytest.mark.parametrize("per_task", ["0.weight", "2.bias", "4.weight"])
@pytest.mark.parametrize("options", ["step weights", "the head alone"])
def test_parameters_of_each_task(force: Any, per_task: str, options: str) -> None:
    assert_agrees(force, "relu, tanh", options, make_tasks((6,), tasks=5), per_task)


def test_mean_squared_error(force: Any) -> None:
    tasks = ragged(make_tasks((6,), tasks=3, out=3))
    tasks.support_y[0, -2:] = torch.nan  # in the padding
    assert_agrees(force, "relu, tanh", "step weights", tasks, loss="mse")


def test_label_smoothing(force: Any) -> None:
    tasks = make_tasks((6,), tasks=3)
    assert_agrees(force, "relu, tanh", "step weights", tasks, loss=nn.CrossEntropyLoss(label_smoothing=0.1))


@pytest.mark.parametrize("tasks", [1, 4, 5, 8, 9, 13])
def test_any_number_of_tasks(force: Any, tasks: int) -> None:
    assert_agrees(force, "relu, tanh", "step weights", make_tasks((6,), tasks=tasks))


def test_a_task_beyond_the_last_full_vector_has_its_samples_in_the_lanes() -> None:
    model = make(NETWORKS["relu, tanh"])
    last = "of the tasks: one at a time, their samples in the lanes"
    for tasks in (1, 9, 25):
        assert f"the last 1 {last}" in plan_of(model, make_tasks((6,), tasks=tasks))
    assert last not in plan_of(model, make_tasks((6,), tasks=8))


def plan_of(model: nn.Module, tasks: TaskBatch) -> str:
    return native.plan(*native_engine.native_call(model, tasks, InnerLoop.create(model, inner_lr=0.3)))


def test_without_gradients_and_adapt(force: Any) -> None:
    model, tasks = make(NETWORKS["relu, tanh"]), make_tasks((6,), tasks=5)
    inner = InnerLoop.create(model, inner_lr=0.3, inner_steps=3, step_weights=[0.5, -0.2, 0.3, 1.0])
    parameters = dict(model.named_parameters())
    results = []
    for paths in (LANES, BLOCKS):
        force(paths)
        algorithm = innerloop.get("maml")(model, inner_lr=0.3, inner_steps=3, engine="native")
        learner = algorithm.adapt(tasks.support_x[0], tasks.support_y[0])
        with torch.no_grad():
            result = by_native(model, parameters, tasks, inner)
            results.append((result.task_losses, result.logits, learner(tasks.query_x[0])))
    for lanes, blocks in zip(*results, strict=True):
        assert_close(lanes, blocks, "without gradients")


def test_the_same_bits_on_two_threads(force: Any) -> None:
    model, tasks = make(NETWORKS["relu, tanh"]), make_tasks((6,), tasks=25)
    inner = InnerLoop.create(model, inner_lr=0.3, inner_steps=2)
    force(LANES)
    found = []
    for threads in (2, 1):
        torch.set_num_threads(threads)
        found.append(run(by_native, model, tasks, inner, None))
    for (what, one), (_, two) in zip(*found, strict=True):
        assert torch.equal(one, two), what
