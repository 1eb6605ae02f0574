"""The learned optimizer: its gradient against autograd of the unrolled optimization, what training and evaluation start
from, and that it learns to optimize."""

from __future__ import annotations

import copy
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

import innerloop
from algorithm_cases import EPISODES, assert_resumes_bit_for_bit, ragged
from command_line import CommandLine
from innerloop import TaskBatch, reference
from innerloop.algorithms.learned_optimizer import LearnedOptimizer
from innerloop.optimizees import Optimizees, by_name, drawn_parameters, own_parameters
from innerloop.training import TrainingSettings, fit


def mlp() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 3), nn.Sigmoid(), nn.Linear(3, 3))


def convnet() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 2, 3, stride=2, padding=1), nn.BatchNorm2d(2), nn.Tanh(), nn.Flatten(), nn.Linear(32, 3)
    )


def algorithm(model: nn.Module, **options: Any) -> LearnedOptimizer:
    torch.manual_seed(0)
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    learned = LearnedOptimizer(model.double(), **{"inner_steps": 7, "truncation": 3, "hidden": 4, **options})
    with torch.no_grad():  # as after training: updates that move the loss
        for weight in learned.weights():
            weight.mul_(3)
    return learned.double()


def tasks() -> TaskBatch:
    return ragged().to(torch.float64)


def autograd_losses(learned: LearnedOptimizer, batch: TaskBatch, initial: Tensor, steps: int) -> Tensor:
    """Support losses after each step, [K, T], by the paper's equations one task after another: the graph of all steps,
    cut between segments, with the gradients that the LSTM is given detached. The samples at each step are those that
    eval() draws."""
    model, hidden, every = copy.deepcopy(learned.model).train(), len(learned.output) - 1, []  # BatchNorm: transductive
    optimizees = Optimizees(learned.model, batch, batch_size=learned.batch_size)
    drawn = [optimizees.samples() for _ in range(steps + 1)]
    for index in range(batch.num_tasks):
        theta, state, losses = initial[index], torch.zeros(4, hidden, initial.shape[1], dtype=torch.float64), []

        def loss_at(theta: Tensor, step: int, index: int = index) -> Tensor:
            mask = drawn[step].query_mask[index]
            x, y = drawn[step].query_x[index][mask], drawn[step].query_y[index][mask]
            return F.cross_entropy(functional_call(model, by_name(model, theta), (x,)), y)

        for step in range(steps):
            if step % learned.truncation == 0:
                theta, state = theta.detach(), state.detach()
            leaf = theta.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(loss_at(leaf, step), leaf)
            update, state = reference.coordinate_lstm(
                gradient[None], state, *learned.weights(), learned.p, learned.averaged
            )
            theta = theta + learned.scale * update[0]
            losses.append(loss_at(theta, step + 1))
        every.append(torch.stack(losses))
    return torch.stack(every, 1)


@pytest.mark.parametrize("engine", ["native", "torch"])
@pytest.mark.parametrize(("averaged", "batch_size"), [(0, 0), (2, 0), (0, 5)])
@pytest.mark.parametrize("build", [mlp, convnet])
def test_the_gradient_is_autograds(build: Any, averaged: int, batch_size: int, engine: str) -> None:
    learned = algorithm(build(), averaged=averaged, batch_size=batch_size, engine=engine).eval()
    expected = autograd_losses(learned, tasks(), own_parameters(learned.model, 2), 7)
    result = learned(tasks())
    torch.testing.assert_close(result.task_losses, expected.detach().mean(0), rtol=1e-9, atol=0)
    torch.testing.assert_close(result.loss.detach(), expected.detach().mean(), rtol=1e-9, atol=0)
    wanted = torch.autograd.grad(expected.mean(), learned.weights())
    for actual, gradient in zip(torch.autograd.grad(result.loss, learned.weights()), wanted, strict=True):
        torch.testing.assert_close(actual, gradient, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("first", [0, 3, 6])
def test_training_goes_back_through_one_segment_from_parameters_drawn_anew(first: int) -> None:
    learned = algorithm(mlp()).train()
    seed = next(s for s in range(99) if _segment(s, learned.model) == first // 3)
    torch.manual_seed(seed)
    initial = drawn_parameters(learned.model, 2)
    torch.manual_seed(seed)
    result = learned(tasks())
    expected = autograd_losses(learned, tasks(), initial, min(first + 3, 7))[first:]
    torch.testing.assert_close(result.task_losses, expected.detach().mean(0), rtol=1e-9, atol=0)
    wanted = torch.autograd.grad(expected.mean(), learned.weights())
    for actual, gradient in zip(torch.autograd.grad(result.loss, learned.weights()), wanted, strict=True):
        torch.testing.assert_close(actual, gradient, rtol=1e-9, atol=1e-12)


def _segment(seed: int, model: nn.Module) -> int:
    torch.manual_seed(seed)
    drawn_parameters(model, 2)
    return int(torch.randint(3, ()))


def test_the_gradient_is_not_differentiated_again() -> None:
    learned = algorithm(mlp())
    gradients = torch.autograd.grad(learned(tasks()).loss, learned.weights(), create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        sum(gradient.sum() for gradient in gradients).backward()


def test_the_model_is_neither_trained_nor_written() -> None:
    learned = algorithm(convnet())
    before = {name: value.clone() for name, value in learned.model.state_dict().items()}
    learned(tasks()).loss.backward()
    assert all(parameter.grad is None for parameter in learned.model.parameters())
    assert all(weight.grad is not None for weight in learned.weights())
    assert all(torch.equal(value, before[name]) for name, value in learned.model.state_dict().items())


def test_a_frozen_parameter_stays() -> None:
    learned = algorithm(mlp()).eval()
    learned.model[1].weight.requires_grad_(False)
    batch = tasks()
    adapted = learned.adapt(batch.support_x[1], batch.support_y[1])
    assert torch.equal(adapted[1].weight, learned.model[1].weight)
    assert not torch.equal(adapted[3].weight, learned.model[3].weight)


@pytest.mark.parametrize("bn", ["transductive", "support", "running"])
def test_adapt_is_the_same_optimization(bn: str) -> None:
    learned = algorithm(convnet(), bn=bn).eval()
    batch = TaskBatch(*(getattr(tasks(), name)[1:] for name in ("support_x", "support_y", "query_x", "query_y")))
    logits = learned(batch).logits[0]
    adapted = learned.adapt(batch.support_x[0], batch.support_y[0])
    for weight in learned.weights():
        weight.data.zero_()
    torch.testing.assert_close(adapted(batch.query_x[0]), logits)


def test_twice_the_steps() -> None:
    learned = algorithm(mlp()).eval()
    learned.inner_steps = 14
    expected = autograd_losses(learned, tasks(), own_parameters(learned.model, 2), 14)
    torch.testing.assert_close(learned(tasks()).task_losses, expected.detach().mean(0), rtol=1e-9, atol=0)


def test_optimizees_are_the_support_losses() -> None:
    model = mlp().double()
    parameters = drawn_parameters(model, 2)
    assert not torch.equal(parameters[0], parameters[1])
    losses, gradients = Optimizees(model, tasks()).losses_and_gradients(parameters)
    for index, task in enumerate(tasks()):
        leaf = parameters[index].clone().requires_grad_()
        keep = task.support_mask[0]
        outputs = functional_call(model, by_name(model, leaf), (task.support_x[0][keep],))
        loss = F.cross_entropy(outputs, task.support_y[0][keep])
        torch.testing.assert_close(losses[index], loss.detach())
        torch.testing.assert_close(gradients[index], torch.autograd.grad(loss, leaf)[0])


def test_minibatches_are_samples_of_the_support_set() -> None:
    batch = tasks()  # 4 and 9 support samples
    optimizees = Optimizees(mlp().double(), batch, batch_size=6)
    draws = [optimizees.samples() for _ in range(40)]
    for index, count in enumerate((4, 6)):
        x, y, mask = batch.support_x[index], batch.support_y[index], batch.support_mask[index]
        seen = set()
        for drawn in draws:
            assert drawn.query_x.shape[1] == 6
            assert int(drawn.query_mask[index].sum()) == count
            places = []
            for sample, label in zip(drawn.query_x[index, :count], drawn.query_y[index, :count], strict=True):
                (place,) = [p for p in range(len(x)) if mask[p] and torch.equal(x[p], sample)]
                assert label == y[place]
                places.append(place)
            assert len(set(places)) == count
            seen |= set(places)
        assert seen == set(mask.nonzero().flatten().tolist())
    assert not all(torch.equal(draws[0].query_x[1], drawn.query_x[1]) for drawn in draws)


def test_minibatches_are_others_in_training_and_the_same_in_evaluation() -> None:
    learned = algorithm(mlp(), batch_size=2)

    def first_of_a_call() -> Tensor:
        return learned.optimizees(tasks()).samples().query_x

    learned.train()
    assert not torch.equal(first_of_a_call(), first_of_a_call())
    learned.eval()
    assert torch.equal(first_of_a_call(), first_of_a_call())


@pytest.mark.parametrize("batch_size", [0, 2])
def test_resumed_bit_for_bit(batch_size: int, tmp_path: Path) -> None:
    def make() -> LearnedOptimizer:
        return algorithm(mlp(), batch_size=batch_size).float()

    assert_resumes_bit_for_bit(make, {**EPISODES, "ways": 3, "shots": 2}, tmp_path)


def test_parameters_that_nothing_draws_anew_are_named() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(3))

    with pytest.raises(ValueError, match=r"model has parameters in 1 \(Own\), which has no method reset_parameters"):
        drawn_parameters(nn.Sequential(nn.Linear(2, 3), Own()), 2)


def test_quadratics_are_the_papers() -> None:
    data = innerloop.data.get("quadratic")
    batch = data.split("train").sample(3, 1, 1, 1, seed=0)
    model = innerloop.models.build("linear")((10,), 1)
    theta = drawn_parameters(model, 3)
    w, y = batch.support_x / 10**0.5, batch.support_y / 10**0.5
    f = ((w @ theta[:, :, None] - y) ** 2).sum((1, 2))
    torch.testing.assert_close(Optimizees(model, batch).losses_and_gradients(theta)[0], f)
    later = data.split("train").sample(1, 1, 1, 1, seed=0, first_task=2)
    assert torch.equal(later.support_x[0], batch.support_x[2])
    assert not torch.equal(data.split("test").sample(1, 1, 1, 1, seed=0).support_x, batch.support_x[:1])
    many = innerloop.data.get("quadratic").sample(400, seed=1).support_x / 10**0.5
    assert abs(float(many.mean())) < 0.02
    assert float(many.std()) == pytest.approx(1, abs=0.02)


def test_it_learns_to_optimize_quadratics() -> None:
    torch.manual_seed(0)
    data = innerloop.data.get("quadratic", dimensions=4)
    learned = LearnedOptimizer(innerloop.models.build("linear")((4,), 1), inner_steps=20, truncation=10)
    test = data.split("test").sample(100)

    def final() -> float:
        losses = learned.optimize(learned.optimizees(test), own_parameters(learned.model, 100), 20).losses
        return float(losses[-1].median() / losses[0].median())

    assert final() > 0.5
    fit(learned, data.split("train"), settings=TrainingSettings(steps=150, meta_batch_size=32, lr=0.01, clip=1.0))
    assert final() < 0.1


@pytest.mark.parametrize(
    ("model", "options"),
    [("conv4", ("filters=2", "downsample=stride")), ("mlp", ("hidden=3", "activation=sigmoid"))],
)
def test_trained_and_evaluated_from_the_command_line(
    innerloop_cli: CommandLine, tmp_path: Path, model: str, options: tuple[str, ...]
) -> None:
    run = tmp_path / "run"
    innerloop_cli(
        "train", "learned_optimizer", "--data", "glyphs", "--run", run, "--steps", 2, "--episodes", 4, "--model",
        model, "--validation-episodes", 2, "--inner-steps", 4, "--truncation", 2,
        *(word for option in options for word in ("--model-option", option)),
    )  # fmt: skip
    record = json.loads(innerloop_cli("evaluate", run, "--inner-steps", 8, "--episodes", 4, "--json"))
    assert (record["ways"], record["episodes"], record["inner_steps"]) == (5, 4, 8)
    assert 0 <= record["mean"] <= 1


def test_quadratics_from_the_command_line(innerloop_cli: CommandLine, tmp_path: Path) -> None:
    innerloop_cli(
        "train", "learned_optimizer", "--data", "quadratic", "--model", "linear", "--run", tmp_path / "run",
        "--steps", 2, "--episodes", 4, "--validation-episodes", 2, "--inner-steps", 4,
    )  # fmt: skip
    assert json.loads((tmp_path / "run" / "test.json").read_text())["metric"] == "mse"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"inner_steps": 0}, "inner_steps is 0, expected at least 1"),
        ({"truncation": 0}, "truncation is 0, expected at least 1"),
        ({"hidden": 0}, "hidden is 0, expected at least 1"),
        ({"batch_size": -1}, "batch_size is -1, expected at least 0"),
        ({"averaged": 21}, "averaged is 21, expected 0 … 20"),
        ({"scale": 0.0}, "scale is 0.0, expected a positive number"),
        ({"p": -1.0}, "p is -1.0, expected a positive number"),
        ({"bn": "batch"}, "bn is 'batch'"),
        ({"engine": "fast"}, "engine is 'fast'"),
    ],
)
def test_options_that_make_no_sense(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LearnedOptimizer(mlp(), **options)


def test_a_model_that_does_not_lower_is_optimized_by_torch(caplog: pytest.LogCaptureFixture) -> None:
    class Odd(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.flatten(1)).erfc()

    learned = algorithm(Odd(64, 3)).eval()
    expected = autograd_losses(learned, tasks(), own_parameters(learned.model, 2), 7)
    with caplog.at_level(logging.WARNING, "innerloop"):
        torch.testing.assert_close(learned(tasks()).task_losses, expected.detach().mean(0), rtol=1e-9, atol=0)
    assert "the torch engine" in caplog.text
