"""iMAML against a dense solve at the same φ in float64, and what it does where the Hessian does not allow one."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import innerloop
from command_line import CommandLine
from innerloop import TaskBatch, primitives
from innerloop.algorithms.imaml import IMAML, conjugate_gradients
from innerloop.engine import Engine
from innerloop.training import TrainingSettings, fit
from nets import assert_close, conv_module, make, make_tasks, mlp_module, ragged
from test_primitives import NETS, dense_hessian, on_both_engines, support_loss, with_and_without_masks

LAMBDA, ALPHA, STEPS = 3.0, 0.1, 4


def build(module: Callable[[], nn.Module], engine: Engine = "auto", **options: Any) -> IMAML:
    given = {"inner_lr": ALPHA, "inner_steps": STEPS, "proximal": LAMBDA, "cg_steps": 200, **options}
    return IMAML(make(module), engine=engine, **given)


def phi_of(algorithm: IMAML, tasks: TaskBatch) -> dict[str, Tensor]:
    return primitives.adapt(
        algorithm.model, tasks, inner_lr=algorithm.inner_lr, inner_steps=algorithm.inner_steps,
        proximal=algorithm.proximal, engine="torch",
    )  # fmt: skip


@on_both_engines
@with_and_without_masks
@pytest.mark.parametrize("net", NETS)
def test_the_meta_gradient_is_that_of_a_dense_solve(net: str, tasks_of: Any, engine_name: str) -> None:
    module, function, shape = NETS[net]
    algorithm, tasks = build(module, engine_name), tasks_of(make_tasks(shape, support=9))
    phi, solutions, losses = phi_of(algorithm, tasks), [], []
    for t in range(tasks.num_tasks):
        theta = {name: value[t].clone().requires_grad_() for name, value in phi.items()}
        keep = slice(None) if tasks.query_mask is None else tasks.query_mask[t]
        loss = F.cross_entropy(function(theta, tasks.query_x[t][keep], None)[0], tasks.query_y[t][keep])
        gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(theta.values()))])
        hessian = dense_hessian(support_loss(function, tasks, t), {n: v[t] for n, v in phi.items()}, list(phi))
        assert torch.linalg.eigvalsh(hessian).min() > -LAMBDA  # conjugate gradients can solve it
        solutions.append(torch.linalg.solve(torch.eye(len(hessian), dtype=torch.float64) + hessian / LAMBDA, gradient))
        losses.append(loss.detach())
    result = algorithm(tasks)
    assert_close(result.task_losses, torch.stack(losses), "losses")
    result.loss.backward()
    ours = torch.cat([parameter.grad.flatten() for parameter in algorithm.model.parameters()])
    assert_close(ours, torch.stack(solutions).mean(0), "meta-gradient")
    assert not algorithm.negative_curvature.any()
    assert (algorithm.stopped, algorithm.solved) == (0, tasks.num_tasks)


@on_both_engines
def test_a_frozen_parameter_is_neither_adapted_nor_learned(engine_name: str) -> None:
    algorithm, tasks = build(mlp_module, engine_name), make_tasks((6,))
    algorithm.model[0].requires_grad_(False)
    algorithm(tasks).loss.backward()
    assert algorithm.model[0].weight.grad is None
    assert algorithm.model[2].weight.grad.abs().max() > 0


@on_both_engines
def test_negative_curvature_stops_its_task_alone_and_is_reported(
    engine_name: str, caplog: pytest.LogCaptureFixture
) -> None:
    algorithm, tasks = build(mlp_module, engine_name, proximal=1.0), make_tasks((6,), support=9)
    with torch.no_grad():
        for parameter in algorithm.model.parameters():
            parameter.mul_(4)  # wrong with confidence: far from a minimum
    # With a λ just below what the most negative eigenvalue of all tasks asks for, that task alone has one left.
    phi = phi_of(algorithm, tasks)
    lowest = [
        torch.linalg.eigvalsh(
            dense_hessian(support_loss(NETS["mlp"][1], tasks, t), {n: v[t] for n, v in phi.items()}, list(phi))
        ).min()
        for t in range(3)
    ]
    assert min(lowest) < -1.0  # λ = 1 does not make I + H/λ positive definite
    with caplog.at_level(logging.WARNING, "innerloop"):
        result = algorithm(tasks)
    expected = algorithm.negative_curvature.clone()
    assert expected.any()
    assert algorithm.stopped == int(expected.sum())
    assert algorithm.solved == 3
    message = next(record.getMessage() for record in caplog.records if "negative curvature" in record.getMessage())
    assert f"{algorithm.stopped} of 3 tasks" in message
    result.loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in algorithm.model.parameters())
    for _ in range(2):
        algorithm(tasks)
    assert algorithm.solved == 9
    caplog.clear()
    with caplog.at_level(logging.WARNING, "innerloop"), torch.no_grad():
        algorithm(tasks)  # no gradient, nothing to solve
    assert algorithm.solved == 9
    assert not caplog.records


# --- conjugate gradients --------------------------------------------------------------------------


def matrices(*diagonals: list[float]) -> Tensor:
    """Symmetric matrices with these eigenvalues, in no convenient basis."""
    g = torch.Generator().manual_seed(0)
    found = []
    for diagonal in diagonals:
        q, _ = torch.linalg.qr(torch.randn(len(diagonal), len(diagonal), generator=g, dtype=torch.float64))
        found.append(q @ torch.diag(torch.tensor(diagonal, dtype=torch.float64)) @ q.T)
    return torch.stack(found)


def solve(a: Tensor, b: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    return conjugate_gradients(lambda x: torch.einsum("tij,tj->ti", a, x), b, steps)


def test_conjugate_gradients_solve_every_task() -> None:
    a = matrices([1, 2, 3, 4, 5], [1, 1, 1, 1, 1], [0.1, 1, 1, 1, 10])
    b = torch.randn(3, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    x, negative = solve(a, b, 50)  # many more steps than it takes: those that are done stand still
    torch.testing.assert_close(x, torch.linalg.solve(a, b), rtol=1e-11, atol=1e-11)
    assert not negative.any()


def test_few_steps_minimise_over_the_krylov_space() -> None:
    a = matrices([1, 2, 3, 4, 5])
    b = torch.randn(1, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    x, _ = solve(a, b, 2)
    basis = torch.stack([b[0], a[0] @ b[0]], dim=1)
    coefficients = torch.linalg.solve(basis.T @ a[0] @ basis, basis.T @ b[0])
    torch.testing.assert_close(x[0], basis @ coefficients, rtol=1e-11, atol=1e-11)


def test_a_task_that_meets_negative_curvature_keeps_what_it_has() -> None:
    definite, indefinite, negative_at_once = matrices([1, 2, 3], [1, 2, -0.3], [-1, -2, -3])
    b = torch.randn(3, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    x, negative = solve(torch.stack((definite, indefinite, negative_at_once)), b, 10)
    torch.testing.assert_close(x[0], torch.linalg.solve(definite, b[0]), rtol=1e-11, atol=1e-11)
    steps = next(k for k in range(1, 10) if bool(solve(indefinite[None], b[1:2], k)[1].any()))
    assert steps > 1
    torch.testing.assert_close(x[1], solve(indefinite[None], b[1:2], steps - 1)[0][0])
    assert torch.equal(x[2], b[2])
    assert negative.tolist() == [False, True, True]


def test_nothing_to_solve_and_a_task_that_is_not_a_number() -> None:
    a = matrices([1, 2, 3], [1, 2, 3], [1, 2, 3])
    b = torch.tensor([[0, 0, 0], [1, torch.nan, 1], [1, 2, 3]], dtype=torch.float64)
    x, negative = solve(a, b, 10)
    assert torch.equal(x[0], b[0])
    assert x[1].isnan().any()  # not hidden
    torch.testing.assert_close(x[2], torch.linalg.solve(a[2], b[2]))
    assert not negative.any()


# --- as an algorithm ------------------------------------------------------------------------------


@on_both_engines
@pytest.mark.parametrize("bn", ["transductive", "support", "running"])
def test_adapt_is_the_same_adaptation(bn: str, engine_name: str) -> None:
    algorithm, tasks = build(conv_module, engine_name, bn=bn), make_tasks((2, 4, 4), support=9)
    logits = algorithm(tasks).logits
    with torch.no_grad():
        assert_close(algorithm(tasks).logits, logits, "evaluation")
    for t in range(tasks.num_tasks):
        learner = algorithm.adapt(tasks.support_x[t], tasks.support_y[t])
        assert_close(learner(tasks.query_x[t]), logits[t], f"task {t}")


@on_both_engines
def test_regression(engine_name: str) -> None:
    algorithm, tasks = build(mlp_module, engine_name), ragged(make_tasks((6,), out=3))
    result = algorithm(tasks)
    assert result.accuracy is None
    result.loss.backward()
    assert algorithm.model[0].weight.grad.abs().max() > 0


def test_training_learns() -> None:
    torch.manual_seed(0)
    glyphs = innerloop.data.get("glyphs")
    model = innerloop.models.build("conv4")((1, 28, 28), outputs=5, filters=8, downsample="stride")
    algorithm = innerloop.get("imaml")(model)
    before = innerloop.evaluate(algorithm, glyphs.split("test"), episodes=100).mean
    fit(algorithm, glyphs.split("train"), settings=TrainingSettings(steps=100, meta_batch_size=4, lr=3e-3))
    after = innerloop.evaluate(algorithm, glyphs.split("test"), episodes=100).mean
    assert after > before + 0.15


def test_from_the_command_line(innerloop_cli: CommandLine, tmp_path: Path) -> None:
    assert "--cg-steps" in innerloop_cli("train", "imaml", "--help")
    small = ("--model-option", "filters=4", "--validation-episodes", 4)
    run = tmp_path / "run"
    innerloop_cli(
        "train", "imaml", "--data", "glyphs", "--run", run, "--steps", 2, "--episodes", 10, "--proximal", 2, *small
    )
    assert json.loads((run / "config.json").read_text())["algorithm"]["options"]["proximal"] == 2.0
    record = json.loads(innerloop_cli("evaluate", run, "--episodes", 10, "--inner-steps", 7, "--json"))
    assert (record["inner_steps"], record["bn"]) == (7, "transductive")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"proximal": 0.0}, "proximal is 0.0, expected a positive number"),
        ({"proximal": float("inf")}, "proximal is inf, expected a positive number"),
        ({"cg_steps": 0}, "cg_steps is 0, expected at least 1"),
        ({"inner_steps": -1}, "inner_steps is -1"),
        ({"bn": "batch"}, "bn is 'batch'"),
        ({"engine": "cuda"}, "engine is 'cuda'"),
    ],
)
def test_options_are_checked_at_once(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(mlp_module, **options)


def test_native_is_refused_at_once_where_the_model_does_not_lower() -> None:
    with pytest.raises(ValueError, match="Softplus"):
        build(lambda: nn.Sequential(nn.Linear(6, 3), nn.Softplus()), "native")
