"""MAML++ against autograd of its definition in float64, in every phase of training; and what its layers keep."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import innerloop
from command_line import CommandLine
from innerloop import TaskBatch, primitives
from innerloop.algorithms.maml_pp import MAMLPlusPlus, step_weights
from innerloop.norms import PerStepBatchNorm
from innerloop.runs import load_run
from innerloop.training import TrainingSettings, fit
from nets import Net, assert_close, conv_module, conv_net, make, make_tasks, mlp_module, mlp_net, ragged

K = 3  # and the head's biases are three: an α for each step must not be taken for one for each of them
NETS: dict[str, tuple[Callable[[], nn.Module], Net, tuple[int, ...]]] = {
    "mlp": (mlp_module, mlp_net, (6,)),
    "conv": (conv_module, conv_net, (2, 4, 4)),
}
GAMMA, BETA = "1.weight", "1.bias"

#: The phases of training: steps done of 100, and the shares of the two annealings.
PHASES = {
    "multi-step, first order": (10, {"multi_step_share": 0.5, "first_order_share": 0.2}),
    "multi-step, second order": (30, {"multi_step_share": 0.5, "first_order_share": 0.2}),
    "last step, first order": (60, {"multi_step_share": 0.5, "first_order_share": 0.8}),
    "last step, second order": (90, {"multi_step_share": 0.5, "first_order_share": 0.8}),
}


def algorithm(net: str, **options: Any) -> MAMLPlusPlus:
    """In float64, with γ, β, α of every step away from one number for all."""
    made = innerloop.get("maml_pp")(make(NETS[net][0]), **{"inner_lr": 0.3, "inner_steps": K, **options})
    torch.manual_seed(2)
    with torch.no_grad():
        for rate in made.rates:
            rate.mul_(1 + 0.5 * torch.randn_like(rate))
        for layer in made.model.modules():
            if isinstance(layer, PerStepBatchNorm):
                for tensor in (layer.weight, layer.bias, layer.running_mean, layer.running_var):
                    tensor.copy_(torch.rand_like(tensor) + 0.5)
    return made


def leaves(made: MAMLPlusPlus) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(the model's parameters, the adapted ones' α) as leaves of a graph of their own."""
    parameters = {name: p.detach().clone().requires_grad_() for name, p in made.model.named_parameters()}
    rates = [rate.detach().clone().requires_grad_() for rate in made.rates]
    adapted = [name for name in parameters if name not in (GAMMA, BETA) or "5.weight" not in parameters]
    return parameters, dict(zip(adapted, rates, strict=True))


def definition(
    net: Net,
    parameters: Mapping[str, Tensor],
    rates: Mapping[str, Tensor],
    tasks: TaskBatch,
    weights: Sequence[float],
    first_order: bool,
    statistics: dict[int, list[Tensor]] | None = None,
) -> tuple[Tensor, Tensor]:
    """([T] losses, [T, Q, out] outputs after the last step): the paper's equations, a task and a step at a time.

    weights: of the query loss after each step. statistics: gets what each step's set normalised, in order.
    """
    losses, outputs = [], []
    for t in range(tasks.num_tasks):
        keep_s = slice(None) if tasks.support_mask is None else tasks.support_mask[t]
        keep_q = slice(None) if tasks.query_mask is None else tasks.query_mask[t]
        theta = {name: parameters[name] for name in rates}
        total = torch.zeros((), dtype=torch.float64)
        for k, weight in enumerate(weights):
            last = min(k, K - 1)
            norms = {n: p[last] if p.dim() == 2 else p for n, p in parameters.items() if n not in rates}

            def run(theta: Mapping[str, Tensor], x: Tensor, norms: Any = norms, last: int = last) -> Tensor:
                out, _ = net({**theta, **norms}, x, None)
                if statistics is not None:
                    statistics.setdefault(last, []).append(F.conv2d(x, theta["0.weight"], theta["0.bias"], padding=1))
                return out

            support = F.cross_entropy(run(theta, tasks.support_x[t][keep_s]), tasks.support_y[t][keep_s])
            gradients = torch.autograd.grad(support, list(theta.values()), create_graph=not first_order)
            theta = {
                name: value - rates[name][last] * gradient
                for (name, value), gradient in zip(theta.items(), gradients, strict=True)
            }
            if weight or k == len(weights) - 1:
                out = run(theta, tasks.query_x[t][keep_q])
                total = total + weight * F.cross_entropy(out, tasks.query_y[t][keep_q])
        losses.append(total)
        outputs.append(out.detach())
    return torch.stack(losses), nn.utils.rnn.pad_sequence(outputs, batch_first=True)


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("tasks_of", [lambda tasks: tasks, ragged], ids=["full", "ragged"])
@pytest.mark.parametrize(
    ("net", "options"),
    [
        ("conv", {"bn": "per_step", "engine": "torch"}),
        ("conv", {"bn": "transductive", "engine": "native"}),
        ("conv", {"bn": "transductive", "engine": "torch"}),
        ("mlp", {"bn": "per_step", "engine": "native"}),  # there is no BatchNorm in it
        ("mlp", {"bn": "per_step", "engine": "torch"}),
    ],
    ids=str,
)
def test_loss_and_all_gradients_are_those_of_the_definition(
    net: str, options: dict[str, Any], tasks_of: Any, phase: str
) -> None:
    done, shares = PHASES[phase]
    made = algorithm(net, **options, **shares)
    made.training_steps = 100
    made.steps_done.fill_(done)
    tasks = tasks_of(make_tasks(NETS[net][2], support=9))
    parameters, rates = leaves(made)
    weights = [0.0, 0.0, 1.0]
    if phase.startswith("multi-step"):
        others = (1 - done / 50) / K  # from a third each to the last alone, in half of 100 steps
        weights = [others, others, 1 - 2 * others]
    losses, outputs = definition(NETS[net][1], parameters, rates, tasks, weights, phase.endswith("first order"))

    result = made(tasks)
    assert_close(result.task_losses, losses.detach(), "task losses")
    valid = torch.ones_like(tasks.query_y, dtype=torch.bool) if tasks.query_mask is None else tasks.query_mask
    assert_close(result.logits[valid], outputs[valid], "logits")
    result.loss.backward()
    wanted = {f"model.{name}": p for name, p in parameters.items()}
    wanted |= {f"rates.{index}": rate for index, rate in enumerate(rates.values())}
    ours = dict(made.named_parameters())
    assert wanted.keys() == ours.keys()
    for name, e in zip(wanted, torch.autograd.grad(losses.mean(), list(wanted.values())), strict=True):
        # A bias before BatchNorm has no gradient, nor has its α: both are rounding noise.
        if net == "conv" and name in ("model.0.bias", "rates.1"):
            assert ours[name].grad.abs().max() < 1e-12
        else:
            assert_close(ours[name].grad, e, name)
    assert made.steps_done == done + 1


def test_the_weights_of_the_steps_are_those_of_the_authors_code() -> None:
    """get_per_step_loss_importance_vector, with epochs of its annealing."""
    steps, epochs = 5, 10
    for epoch in range(epochs):
        others = max(1 / steps - epoch * (1 / steps / epochs), 0.03 / steps)
        last = min(1 / steps + epoch * (steps - 1) / steps / epochs, 1 - (steps - 1) * 0.03 / steps)
        assert step_weights(steps, epoch / epochs) == pytest.approx((0, *[others] * (steps - 1), last))
    assert step_weights(5, 1.0) == pytest.approx((0, *[0.006] * 4, 0.976))
    assert step_weights(1, 0.0) == (0, 1)


@pytest.mark.parametrize("steps", [0, 1, K, K + 2])
def test_evaluation_counts_the_last_step_and_goes_on_with_it(steps: int) -> None:
    made, tasks = algorithm("conv", multi_step_share=1.0).eval(), make_tasks((2, 4, 4), support=9)
    made.inner_steps = steps
    parameters, rates = leaves(made)
    result = made(tasks)
    if steps == 0:
        first = {name: p[0] if name in (GAMMA, BETA) else p for name, p in parameters.items()}
        outputs = torch.stack([conv_net(first, x, None)[0] for x in tasks.query_x])
    else:
        weights = [0.0] * (steps - 1) + [1.0]
        _, outputs = definition(conv_net, parameters, rates, tasks, weights, first_order=True)
    assert_close(result.logits, outputs.detach(), "logits")
    assert made.steps_done == 0
    learner = made.adapt(tasks.support_x[1], tasks.support_y[1])
    assert_close(learner(tasks.query_x[1]), result.logits[1], "adapt")


# --- per-step BatchNorm -------------------------------------------------------------------------------


def test_each_step_collects_statistics_of_its_own_in_training() -> None:
    made, tasks = algorithm("conv", multi_step_share=1.0), make_tasks((2, 4, 4), support=9)
    layer = made.model[1]
    mean, var = layer.running_mean.clone(), layer.running_var.clone()
    seen: dict[int, list[Tensor]] = {}
    definition(conv_net, *leaves(made), tasks, [0.3, 0.3, 0.4], first_order=True, statistics=seen)
    assert [len(passes) for passes in seen.values()] == [2 * 3] * K  # support and query of three tasks
    for k, passes in seen.items():
        for x in passes:
            mean[k] = 0.9 * mean[k] + 0.1 * x.mean((0, 2, 3))
            var[k] = 0.9 * var[k] + 0.1 * x.var((0, 2, 3))
    made(tasks)
    assert_close(layer.running_mean, mean.detach(), "means")
    assert_close(layer.running_var, var.detach(), "variances")


def test_nothing_but_training_collects_and_nothing_reads() -> None:
    made, tasks = algorithm("conv"), make_tasks((2, 4, 4), support=9)
    layer = made.model[1]
    before = layer.running_mean.clone()
    made.adapt(tasks.support_x[0], tasks.support_y[0])(tasks.query_x[0])
    with torch.no_grad():
        made(tasks)
    # By others, the model is not changed in train() either.
    options: dict[str, Any] = {"inner_lr": 0.1, "inner_steps": 2, "bn": "per_step"}
    primitives.meta_gradient(made.model, tasks, **options)
    bn: Any = "per_step"
    primitives.hessian_vector_product(made.model, tasks, dict(made.model.named_parameters()), bn=bn)
    innerloop.maml_loss(made.model, tasks, **options).backward()
    assert made.training
    logits = made.eval()(tasks).logits
    assert torch.equal(layer.running_mean, before)
    layer.running_mean.zero_()
    layer.running_var.fill_(9)
    assert torch.equal(made(tasks).logits, logits)


def test_the_users_model_keeps_its_norms_and_shares_its_other_parameters() -> None:
    model = make(conv_module)
    norm, state = model[1], {name: value.clone() for name, value in model[1].state_dict().items()}
    made = innerloop.get("maml_pp")(model, inner_steps=2)
    assert made.model[0].weight is model[0].weight
    assert type(made.model[1]) is PerStepBatchNorm
    assert torch.equal(made.model[1].weight, state["weight"].expand(2, -1))
    fit(made, [make_tasks((2, 4, 4))], settings=TrainingSettings(steps=2))
    assert model[1] is norm
    assert all(torch.equal(value, state[name]) for name, value in norm.state_dict().items())
    assert innerloop.get("maml_pp")(model, bn="transductive").model is model


def test_a_norm_without_parameters_or_statistics() -> None:
    model = nn.Sequential(
        nn.Linear(6, 4), nn.BatchNorm1d(4, affine=False), nn.BatchNorm1d(4, track_running_stats=False), nn.Linear(4, 3)
    )
    made = innerloop.get("maml_pp")(model.double(), inner_steps=2, multi_step_share=1.0)
    made(make_tasks((6,))).loss.backward()
    bare, untracked = made.model[1], made.model[2]
    assert bare.weight is None
    assert bare.running_mean.shape == (2, 4)
    assert bool(untracked.weight.grad.abs().sum(1).all())  # of both steps
    assert untracked.running_mean is None


# --- engines, options, training ------------------------------------------------------------------------


def test_per_step_norms_take_the_torch_engine(caplog: pytest.LogCaptureFixture) -> None:
    tasks = make_tasks((2, 4, 4))
    with caplog.at_level(logging.WARNING, logger="innerloop"):
        algorithm("conv", bn="support")(tasks)
        assert not caplog.messages
        made = algorithm("conv")
        made(tasks)
        made(tasks)
    assert len(caplog.messages) == 1
    assert "the torch engine computes the meta-gradient: layer '1' does not lower: PerStepBatchNorm" in caplog.text
    with pytest.raises(ValueError, match="its γ and β differ between inner steps"):
        algorithm("conv", engine="native")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"inner_steps": 0}, "inner_steps is 0, expected an integer of at least 1"),
        ({"multi_step_share": 1.5}, r"multi_step_share is 1\.5, expected a share of training"),
        ({"first_order_share": -0.1}, r"first_order_share is -0\.1"),
        ({"bn": "per-step"}, r"bn is 'per-step'. Did you mean 'per_step'"),
    ],
)
def test_options_that_make_no_sense(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        innerloop.get("maml_pp")(make(conv_module), **options)


@pytest.mark.parametrize("call", [innerloop.get("maml"), lambda model, **options: innerloop.maml_loss(
    model, make_tasks((2, 4, 4)), inner_lr=0.1, **options)], ids=["maml", "maml_loss"])  # fmt: skip
def test_per_step_needs_norms_of_its_own(call: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match=r"one γ and β for all steps: innerloop\.get\('maml_pp'\) gives each its own"):
        call(make(conv_module), bn="per_step")


def test_training_says_how_long_it_is_and_anneals_by_it() -> None:
    made = algorithm("mlp", multi_step_share=0.5, first_order_share=0.25)
    seen = []

    def note(done: int, result: object) -> None:
        inner = made.inner_loop(classification=True)
        seen.append((int(made.steps_done), inner.first_order, [round(w, 3) for w in inner.step_weights[1:]]))

    fit(made, [make_tasks((6,))], settings=TrainingSettings(steps=8), progress=note)
    assert seen[:4] == [
        (1, True, [0.25, 0.25, 0.5]),
        (2, False, [0.167, 0.167, 0.667]),
        (3, False, [0.083, 0.083, 0.833]),
        (4, False, [0, 0, 1]),
    ]


def test_the_command_line_trains_it_by_a_cosine(innerloop_cli: CommandLine, tmp_path: Path) -> None:
    small = ("--steps", 2, "--shots", 5, "--episodes", 4, "--validation-episodes", 4)
    innerloop_cli(
        "train",
        "maml_pp",
        "--data",
        "sinusoid",
        "--inner-lr",
        0.01,
        "--run",
        tmp_path,
        "--multi-step-share",
        0.5,
        *small,
    )
    config, _, trained = load_run(tmp_path)
    assert config.training.schedule == "cosine"
    assert (trained.multi_step_share, int(trained.steps_done)) == (0.5, 2)
