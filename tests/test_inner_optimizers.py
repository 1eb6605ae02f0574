"""Momentum and Adam in the inner loop: against torch.optim, and against autograd of an unroll written out."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import innerloop
from innerloop import TaskBatch, inner_optimizers, native_engine, torch_engine
from innerloop.inner_loop import InnerLoop
from innerloop.inner_optimizers import Directions
from innerloop.options import options_of
from nets import Net, assert_close, conv_module, conv_net, make, make_tasks, mlp_module, mlp_net, ragged

OPTIMIZERS = ["momentum", "adam"]
K, ALPHA = 4, 0.05
NETS: dict[str, tuple[Callable[[], nn.Module], Net, tuple[int, ...]]] = {
    "mlp": (mlp_module, mlp_net, (6,)),
    "conv": (conv_module, conv_net, (2, 4, 4)),
}
by_torch = {
    "momentum": partial(torch.optim.SGD, lr=ALPHA, momentum=0.9),
    "adam": partial(torch.optim.Adam, lr=ALPHA),
}
for_each_optimizer = pytest.mark.parametrize("optimizer", OPTIMIZERS)


@for_each_optimizer
@pytest.mark.parametrize("net", NETS)
def test_an_adaptation_ends_where_torch_optim_does(net: str, optimizer: str) -> None:
    model, tasks = make(NETS[net][0]), make_tasks(NETS[net][2], support=9)
    model.eval()  # the twin's BatchNorm, too, normalises with running statistics
    algorithm = innerloop.get("maml")(
        model, inner_lr=ALPHA, inner_steps=K, bn="running", engine="torch", inner_optimizer=optimizer
    )
    logits = algorithm(tasks).logits
    for t in range(tasks.num_tasks):
        twin = copy.deepcopy(model)
        steps = by_torch[optimizer](twin.parameters())
        for _ in range(K):
            steps.zero_grad()
            F.cross_entropy(twin(tasks.support_x[t]), tasks.support_y[t]).backward()
            steps.step()
        expected = twin(tasks.query_x[t]).detach()
        assert_close(logits[t], expected, "meta_result")
        learner = algorithm.adapt(tasks.support_x[t], tasks.support_y[t])
        assert_close(learner(tasks.query_x[t]), expected, "adapt")


def unrolled(
    net: Net, parameters: Mapping[str, Tensor], alpha: Tensor, tasks: TaskBatch, optimizer: str, first_order: bool
) -> tuple[Tensor, Tensor]:
    """([T] query losses after K steps, [T] support losses before): the update rules of the papers, written out."""
    losses, supports = [], []
    for t in range(tasks.num_tasks):
        keep_s = slice(None) if tasks.support_mask is None else tasks.support_mask[t]
        keep_q = slice(None) if tasks.query_mask is None else tasks.query_mask[t]
        theta = dict(parameters)
        m: dict[str, Any] = dict.fromkeys(theta, 0.0)
        v: dict[str, Any] = dict.fromkeys(theta, 0.0)
        for k in range(K):
            loss = F.cross_entropy(net(theta, tasks.support_x[t][keep_s], None)[0], tasks.support_y[t][keep_s])
            supports += [loss] if k == 0 else []
            gradients = torch.autograd.grad(loss, list(theta.values()), create_graph=True)
            for (name, value), g in zip(list(theta.items()), gradients, strict=True):
                g = g.detach() if first_order else g
                if optimizer == "momentum":
                    m[name] = 0.9 * m[name] + g
                    theta[name] = value - alpha[k] * m[name]
                else:
                    m[name] = 0.9 * m[name] + 0.1 * g
                    v[name] = 0.999 * v[name] + 0.001 * g**2
                    m_hat, v_hat = m[name] / (1 - 0.9 ** (k + 1)), v[name] / (1 - 0.999 ** (k + 1))
                    theta[name] = value - alpha[k] * m_hat / (v_hat.sqrt() + 1e-8)
        losses.append(F.cross_entropy(net(theta, tasks.query_x[t][keep_q], None)[0], tasks.query_y[t][keep_q]))
    return torch.stack(losses), torch.stack(supports)


@for_each_optimizer
@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize("path", ["loop", "vmap", "ragged", "conv"])
def test_the_meta_gradient_is_that_of_the_unroll(
    path: str, first_order: bool, optimizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, net, shape = NETS["conv" if path == "conv" else "mlp"]
    model, tasks = make(module), make_tasks(shape, support=9)
    if path == "conv":
        model[0].bias.requires_grad_(False)  # before BatchNorm: Adam would make steps of rounding noise
    tasks = ragged(tasks) if path == "ragged" else tasks
    if path == "loop":
        monkeypatch.setattr(torch_engine, "VMAP_MAX_PARAMETERS", 0)
    alpha = torch.linspace(0.5, 1, K, dtype=torch.float64).mul(ALPHA).requires_grad_()
    adapted = {name: p for name, p in model.named_parameters() if p.requires_grad}
    fixed = {name: p for name, p in model.named_parameters() if not p.requires_grad}
    losses, supports = unrolled(
        lambda p, x, statistics: net({**fixed, **p}, x, statistics), adapted, alpha, tasks, optimizer, first_order
    )
    expected = losses.mean() + 0.5 * supports.mean()
    actual = innerloop.maml_loss(
        model,
        tasks,
        inner_lr=alpha,
        inner_steps=K,
        support_weight=0.5,
        first_order=first_order,
        inner_optimizer=optimizer,
        engine="torch",
    )
    assert_close(actual, expected, "loss")
    inputs = [*adapted.values(), alpha]
    ours = torch.autograd.grad(actual, inputs)
    for name, a, e in zip([*adapted, "α"], ours, torch.autograd.grad(expected, inputs), strict=True):
        assert_close(a, e, name)


# --- Adam where a gradient is zero ----------------------------------------------------------------------


def test_adam_has_no_nan_where_a_gradient_is_zero() -> None:
    """A unit of a ReLU net that no sample reaches: autograd of √v alone is NaN there."""
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).double()
    with torch.no_grad():
        model[0].bias[:3] = -100
    loss = innerloop.maml_loss(
        model, ragged(make_tasks((6,))), inner_lr=0.01, inner_steps=3, inner_optimizer="adam", engine="torch"
    )
    loss.backward()
    assert all(bool(parameter.grad.isfinite().all()) for parameter in model.parameters())
    assert not model[0].weight.grad[:3].any()
    assert model[0].weight.grad[3:].any()


@for_each_optimizer
def test_directions_are_exact_to_second_order_also_at_zero(optimizer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Adam's direction changes by 1/ε around 0: with the usual one, finite differences would have to be of 1e-14.
    monkeypatch.setattr(inner_optimizers, "EPSILON", 1.0)

    def directions(*gradients: Tensor) -> tuple[Tensor, ...]:
        state = Directions(optimizer)
        return tuple(state.next("p", gradient) for gradient in gradients)

    away = [torch.tensor(g, dtype=torch.float64, requires_grad=True) for g in ([0.3, -2.0], [1.5, 0.7], [-0.4, 0.2])]
    assert torch.autograd.gradcheck(directions, away)
    assert torch.autograd.gradgradcheck(directions, away)
    at_zero = [torch.zeros(2, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    assert torch.autograd.gradcheck(directions, at_zero, atol=1e-4)


# --- which engine, which algorithms -----------------------------------------------------------------------


@for_each_optimizer
def test_the_native_engine_leaves_it_to_torch(optimizer: str, caplog: pytest.LogCaptureFixture) -> None:
    model, tasks = make(mlp_module), make_tasks((6,))
    call = partial(innerloop.maml_loss, model, tasks, inner_lr=0.1, inner_steps=2, inner_optimizer=optimizer)
    with pytest.raises(ValueError, match=f"engine is 'native', but inner_optimizer is '{optimizer}'"):
        call(engine="native")
    with caplog.at_level(logging.WARNING, logger="innerloop"):
        loss = call()
        call()
    assert_close(loss, call(engine="torch"), "loss")
    (line,) = caplog.messages
    assert f"the torch engine computes the meta-gradient: inner_optimizer is '{optimizer}'" in line
    inner = InnerLoop.create(model, inner_lr=0.1, inner_optimizer=optimizer)
    assert native_engine.why_not_native(model, tasks, inner) is not None


@for_each_optimizer
@pytest.mark.parametrize("name", ["maml", "fomaml", "anil", "boil", "proto_maml", "reptile"])
def test_relatives_of_maml_take_it_and_adapt_alike(name: str, optimizer: str) -> None:
    model, tasks = make(conv_module), make_tasks((2, 4, 4), support=9)
    algorithm = innerloop.get(name)(model, inner_lr=ALPHA, inner_steps=2, inner_optimizer=optimizer, engine="torch")
    plain = innerloop.get(name)(model, inner_lr=ALPHA, inner_steps=2, engine="torch")
    logits = algorithm(tasks).logits
    assert (logits - plain(tasks).logits).abs().max() > 1e-4
    learner = algorithm.adapt(tasks.support_x[0], tasks.support_y[0])
    assert_close(learner(tasks.query_x[0]), logits[0], "adapt")
    assert "inner_optimizer" in {option.name for option in options_of(innerloop.get(name))}


def test_an_optimizer_that_there_is_not() -> None:
    with pytest.raises(ValueError, match=r"inner_optimizer is 'adamw'\. Did you mean 'adam'"):
        innerloop.get("maml")(make(mlp_module), inner_optimizer="adamw")
