"""The relatives of MAML, each against autograd of its definition in float64, on both engines."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import innerloop
from innerloop import Algorithm, TaskBatch
from innerloop.options import options_of
from nets import (
    Net,
    assert_close,
    conv_module,
    conv_net,
    definition,
    make,
    make_tasks,
    mlp_module,
    mlp_net,
    ragged,
)

ALPHA = 0.3

on_both_engines = pytest.mark.parametrize("engine", ["native", "torch"])
with_and_without_masks = pytest.mark.parametrize("tasks_of", [lambda tasks: tasks, ragged], ids=["full", "ragged"])
#: Module, the same as a function, and the shape of a sample.
NETS: dict[str, tuple[Callable[[], nn.Module], Net, tuple[int, ...]]] = {
    "mlp": (mlp_module, mlp_net, (6,)),
    "conv": (conv_module, conv_net, (2, 4, 4)),
}
HEADS = {"mlp": ["2.weight", "2.bias"], "conv": ["5.weight", "5.bias"]}


def algorithm_and_tasks(name: str, net: str, tasks_of: Callable[[TaskBatch], TaskBatch], **options: Any) -> Any:
    """(the algorithm, its tasks, θ₀ by name as leaves of a graph of their own)."""
    module, _, shape = NETS[net]
    algorithm = innerloop.get(name)(make(module), **options)
    parameters = {key: p.detach().clone().requires_grad_() for key, p in algorithm.model.named_parameters()}
    return algorithm, tasks_of(make_tasks(shape, support=9)), parameters


def check(algorithm: Algorithm, tasks: TaskBatch, expected: Tensor, logits: Tensor, wanted: dict[str, Tensor]) -> None:
    """Losses, outputs, and gradients of the algorithm's parameters, by their names in the algorithm."""
    result = algorithm(tasks)
    assert_close(result.task_losses, expected.detach(), "task losses")
    valid = torch.ones_like(tasks.query_y, dtype=torch.bool) if tasks.query_mask is None else tasks.query_mask
    for t in range(tasks.num_tasks):
        assert_close(result.logits[t][valid[t]], logits[t][: int(valid[t].sum())], "logits")
    result.loss.backward()
    gradients = torch.autograd.grad(expected.mean(), list(wanted.values()), allow_unused=True)
    ours = dict(algorithm.named_parameters())
    for name, gradient in zip(wanted, gradients, strict=True):
        if name != "model.0.bias" or "1.weight" not in wanted:  # of a convolution before BatchNorm: zero but for noise
            assert_close(ours[name].grad, gradient, name)


@on_both_engines
@with_and_without_masks
@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("name", ["fomaml", "anil", "boil"])
def test_a_choice_of_what_is_adapted_and_differentiated(name: str, net: str, tasks_of: Any, engine: str) -> None:
    algorithm, tasks, parameters = algorithm_and_tasks(
        name, net, tasks_of, inner_lr=ALPHA, inner_steps=3, engine=engine
    )
    moves = {"fomaml": lambda p: True, "anil": lambda p: p in HEADS[net], "boil": lambda p: p not in HEADS[net]}[name]
    losses, logits = definition(
        NETS[net][1],
        parameters,
        tasks,
        lambda p, _: ALPHA if moves(p) else 0.0,
        inner_steps=3,
        first_order=name == "fomaml",
    )
    check(algorithm, tasks, losses, logits, {f"model.{key}": p for key, p in parameters.items()})


@on_both_engines
@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize("steps", [1, 3])  # with three, α of the head's three biases has the shape of one for each step
@pytest.mark.parametrize("net", NETS)
def test_meta_sgd_learns_a_rate_of_every_element(net: str, steps: int, first_order: bool, engine: str) -> None:
    algorithm, tasks, parameters = algorithm_and_tasks(
        "meta_sgd", net, ragged, inner_lr=ALPHA, inner_steps=steps, first_order=first_order, engine=engine
    )
    torch.manual_seed(2)
    with torch.no_grad():
        for rate in algorithm.rates:
            rate.mul_(1 + 0.5 * torch.randn_like(rate))  # away from one number for all
    rates = {key: rate.detach().clone().requires_grad_() for key, rate in zip(parameters, algorithm.rates, strict=True)}
    losses, logits = definition(
        NETS[net][1], parameters, tasks, lambda p, _: rates[p], inner_steps=steps, first_order=first_order
    )
    wanted = {f"model.{key}": p for key, p in parameters.items()}
    wanted |= {f"rates.{index}": rate for index, rate in enumerate(rates.values())}
    check(algorithm, tasks, losses, logits, wanted)


@on_both_engines
@with_and_without_masks
@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("net", NETS)
def test_proto_maml_goes_through_its_prototypes(net: str, steps: int, tasks_of: Any, engine: str) -> None:
    algorithm, tasks, parameters = algorithm_and_tasks(
        "proto_maml", net, tasks_of, inner_lr=ALPHA, inner_steps=steps, engine=engine
    )
    weight, bias = HEADS[net]
    ways, dim = parameters[weight].shape
    body = parameters | {weight: torch.eye(dim, dtype=torch.float64), bias: torch.zeros(dim, dtype=torch.float64)}
    heads = []
    for t in range(tasks.num_tasks):
        keep = slice(None) if tasks.support_mask is None else tasks.support_mask[t]
        embedded, _ = NETS[net][1](body, tasks.support_x[t][keep], None)
        labels = tasks.support_y[t][keep]
        heads.append(torch.stack([embedded[labels == c].mean(0) for c in range(ways)]))
    centres = torch.stack(heads)
    # The inner gradient is the partial one, by the head and by the body, though the head was made by the body.
    body_alias = {key: value.view_as(value) for key, value in parameters.items()}
    initial = body_alias | {weight: 2 * centres, bias: -(centres**2).sum(2)}
    losses, logits = definition(
        NETS[net][1], initial, tasks, lambda *_: ALPHA, inner_steps=steps, per_task=(weight, bias)
    )
    check(algorithm, tasks, losses, logits, {f"model.{k}": p for k, p in parameters.items() if k not in HEADS[net]})
    assert all(algorithm.model.get_parameter(name).grad is None for name in HEADS[net])


def test_proto_maml_needs_a_linear_head_of_the_tasks_ways() -> None:
    with pytest.raises(ValueError, match=r"model ends in Conv2d, expected an nn\.Linear with a bias as its head"):
        innerloop.get("proto_maml")(nn.Sequential(nn.Conv2d(1, 3, 3), nn.Flatten()))
    for head_alone in (nn.Linear(6, 3), nn.Sequential(nn.Flatten(), nn.Linear(6, 3))):
        with pytest.raises(ValueError, match="model has no parameters but its head's"):
            innerloop.get("proto_maml")(head_alone)
    algorithm = innerloop.get("proto_maml")(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 5)).double())
    with pytest.raises(ValueError, match="tasks has 3 ways, but the model's head has 5 outputs"):
        algorithm(make_tasks((6,)))


@on_both_engines
@with_and_without_masks
@pytest.mark.parametrize("net", NETS)
def test_reptile_points_away_from_the_adapted_parameters(net: str, tasks_of: Any, engine: str) -> None:
    steps = 3
    algorithm, tasks, parameters = algorithm_and_tasks(
        "reptile", net, tasks_of, inner_lr=ALPHA, inner_steps=steps, engine=engine
    )
    run, starts, adapted = NETS[net][1], [], []
    for t in range(tasks.num_tasks):
        keep = slice(None) if tasks.support_mask is None else tasks.support_mask[t]
        theta = dict(parameters)
        for step in range(steps):
            loss = F.cross_entropy(run(theta, tasks.support_x[t][keep], None)[0], tasks.support_y[t][keep])
            starts += [loss.detach()] if step == 0 else []
            gradients = torch.autograd.grad(loss, list(theta.values()))
            theta = {
                key: (value - ALPHA * gradient).detach().requires_grad_()
                for (key, value), gradient in zip(theta.items(), gradients, strict=True)
            }
        adapted.append(theta)
    result = algorithm(tasks)
    assert_close(result.task_losses, torch.stack(starts), "support losses before adaptation")
    (2 * result.loss).backward()
    for key, parameter in algorithm.model.named_parameters():
        away = parameter.detach() - torch.stack([theta[key].detach() for theta in adapted]).mean(0)
        assert_close(parameter.grad, 2 * away, key)


def test_reptile_is_not_differentiated_again() -> None:
    algorithm, tasks, _ = algorithm_and_tasks("reptile", "mlp", ragged)
    gradients = torch.autograd.grad(algorithm(tasks).loss, list(algorithm.model.parameters()), create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        sum(gradient.sum() for gradient in gradients).backward()


@on_both_engines
@pytest.mark.parametrize("bn", ["transductive", "support", "running"])
@pytest.mark.parametrize("name", ["fomaml", "anil", "boil", "meta_sgd", "proto_maml", "reptile"])
def test_adapt_is_the_same_adaptation(name: str, bn: str, engine: str) -> None:
    algorithm, tasks, _ = algorithm_and_tasks(
        name, "conv", lambda tasks: tasks, inner_lr=ALPHA, inner_steps=2, bn=bn, engine=engine
    )
    logits = algorithm(tasks).logits
    for t in range(tasks.num_tasks):
        learner = algorithm.adapt(tasks.support_x[t], tasks.support_y[t])
        assert_close(learner(tasks.query_x[t]), logits[t], f"task {t}")


@pytest.mark.parametrize("name", ["fomaml", "anil", "boil", "meta_sgd", "proto_maml", "reptile", "imaml"])
def test_the_command_line_offers_the_options(name: str) -> None:
    options = {option.name for option in options_of(innerloop.get(name))}
    assert options >= {"inner_lr", "inner_steps", "bn", "engine"}
    assert ("first_order" in options) == (name not in ("fomaml", "reptile", "imaml"))


def test_boil_needs_a_body() -> None:
    with pytest.raises(ValueError, match="no parameters before its head"):
        innerloop.get("boil")(nn.Linear(6, 3))
