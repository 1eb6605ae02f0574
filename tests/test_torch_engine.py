"""The torch engine against the meta-loss written down as the equations stand (nets.definition), in float64."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import innerloop
from innerloop import TaskBatch, torch_engine
from innerloop.inner_loop import InnerLoop
from nets import Net, assert_close, conv_module, conv_net, definition, make, make_tasks, mlp_module, mlp_net, ragged

maml_loss = partial(innerloop.maml_loss, engine="torch")

NETS: dict[str, tuple[Callable[[], nn.Module], Net, tuple[int, ...]]] = {
    "mlp": (mlp_module, mlp_net, (6,)),
    "conv": (conv_module, conv_net, (2, 4, 4)),
}
HEAD = {"mlp": "2", "conv": "5"}


def rates(kind: str, model: nn.Module, steps: int) -> tuple[Any, Callable[[str, int], Any], list[Tensor]]:
    """(inner_lr as a user writes it, α(name, step) as the definition reads it, the tensors that are learned)."""
    torch.manual_seed(5)
    parameters = dict(model.named_parameters())

    def learned(*shape: int) -> Tensor:
        return (0.1 + 0.2 * torch.rand(shape, dtype=torch.float64)).requires_grad_()

    if kind == "number":
        return 0.3, lambda name, k: 0.3, []
    if kind == "0-d":
        one = learned()
        return one, lambda name, k: one, [one]
    if kind == "[K]":
        each = learned(steps)
        return each, lambda name, k: each[k], [each]
    if kind == "layers":  # a prefix, a longer name that beats it, and a layer without an α
        layer, bias = learned(steps), learned()
        return (
            {"0": layer, "0.bias": bias},
            lambda name, k: {"0.weight": layer[k], "0.bias": bias}.get(name, 0.0),
            [layer, bias],
        )
    if kind == "parameter-shaped":
        shaped = {name: learned(*p.shape) for name, p in parameters.items()}
        return shaped, lambda name, k: shaped[name], list(shaped.values())
    assert kind == "[K,*parameter]"
    full = {name: learned(steps, *p.shape) for name, p in parameters.items()}
    return full, lambda name, k: full[name][k], list(full.values())


CASES: list[dict[str, Any]] = [
    *({"net": net, "K": K, "first_order": first} for net in NETS for K in (0, 1, 2, 3) for first in (False, True)),
    *(
        {"net": net, "K": 2, "rates": kind, "first_order": first}
        for net in NETS
        for kind in ("0-d", "[K]", "layers", "parameter-shaped", "[K,*parameter]")
        for first in (False, True)
    ),
    *({"net": net, "K": K, "w": True, "u": 0.7, "first_order": f} for net in NETS for K in (0, 3) for f in (0, 1)),
    *({"net": net, "K": 2, "w": True, "u": 1.0, "ragged": True} for net in NETS),
    *({"net": net, "K": 2, "head_only": True, "w": True, "rates": "[K]"} for net in NETS),
    *({"net": net, "K": 2, "per_task": True, "u": 0.5, "ragged": r} for net in NETS for r in (False, True)),
    {"net": "mlp", "K": 3, "regression": True, "w": True, "u": 0.3, "rates": "[K]"},
    *(
        {"net": "conv", "K": K, "bn": bn, "w": w, "u": 0.4 * w, "first_order": first, "ragged": ragged}
        for bn in ("support", "running")
        for K, w, first, ragged in ((0, 0, 0, 0), (1, 0, 0, 0), (2, 1, 0, 1), (2, 1, 1, 0), (3, 0, 1, 0))
    ),
]


def label(case: dict[str, Any]) -> str:
    return "-".join(f"{key}={value}" if key != "net" else value for key, value in case.items() if value)


@pytest.mark.parametrize("case", CASES, ids=label)
def test_loss_outputs_and_all_gradients_are_those_of_the_definition(case: dict[str, Any]) -> None:
    module, net, shape = NETS[case["net"]]
    model = make(module)
    K, bn = case["K"], case.get("bn", "transductive")
    tasks = make_tasks(shape, out=3 if case.get("regression") else None)
    if case.get("ragged"):
        tasks = ragged(tasks)
    inner_lr, alpha, learned = rates(case.get("rates", "number"), model, K)
    head = HEAD[case["net"]] if case.get("head_only") else None
    shared: dict[str, Any] = {
        "inner_steps": K,
        "step_weights": [0.5, -0.25, 2.0, 1.5][: K + 1] if case.get("w") else None,
        "support_weight": case.get("u", 0.0),
        "first_order": bool(case.get("first_order")),
        "bn": bn,
    }
    parameters = {name: p.detach().clone() for name, p in model.named_parameters()}
    own = [name for name in parameters if name.startswith(HEAD[case["net"]])] if case.get("per_task") else []
    for name in own:
        parameters[name] = parameters[name] + 0.1 * torch.randn(3, *parameters[name].shape, dtype=torch.float64)
    for value in parameters.values():
        value.requires_grad_()
    loss = "mse" if case.get("regression") else "cross_entropy"
    inner = InnerLoop.create(model, inner_lr=inner_lr, adapt=head, loss=loss, **shared)

    result = torch_engine.meta_result(model, parameters, tasks, inner)
    running = (model[1].running_mean, model[1].running_var) if bn == "running" else None
    losses, outputs = definition(
        net,
        parameters,
        tasks,
        lambda name, k: alpha(name, k) if head is None or name.startswith(head) else 0.0,
        running=running,
        per_task=own,
        **shared,
    )
    assert_close(result.task_losses, losses, "task_losses")
    assert_close(result.logits, outputs, "logits")
    inputs = [*parameters.values(), *learned]
    actual = torch.autograd.grad(result.loss, inputs, allow_unused=True)
    expected = torch.autograd.grad(losses.mean(), inputs, allow_unused=True)
    for name, a, e in zip([*parameters, *(f"α {i}" for i in range(len(learned)))], actual, expected, strict=True):
        if case["net"] == "conv" and name == "0.bias" and bn != "running":
            # A bias before BatchNorm has no gradient from a pass with its own statistics; both are rounding noise.
            assert a is None or a.abs().max() < 1e-12
        else:
            assert_close(a, e, name)


# --- vmap -----------------------------------------------------------------------------------------

ACTIVATIONS = [nn.ReLU, nn.LeakyReLU, nn.Tanh, nn.Sigmoid, nn.GELU]


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("regression", [False, True], ids=["cross_entropy", "mse"])
@pytest.mark.parametrize("per_task", [False, True], ids=["shared", "per task"])
@pytest.mark.parametrize("first_order", [False, True], ids=["second order", "first order"])
def test_vmap_and_loop_agree(
    activation: type[nn.Module], regression: bool, per_task: bool, first_order: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make(lambda: nn.Sequential(nn.Flatten(), nn.Linear(6, 8), activation(), nn.Linear(8, 3)))
    tasks = make_tasks((2, 3), out=3 if regression else None)
    alpha = torch.tensor([0.1, 0.2], dtype=torch.float64, requires_grad=True)
    inner = InnerLoop.create(
        model,
        inner_lr=alpha,
        inner_steps=2,
        step_weights=[0.5, 1.0, 2.0],
        support_weight=0.5,
        first_order=first_order,
        loss="mse" if regression else "cross_entropy",
    )
    parameters = {
        name: (p.detach() + 0.1 * torch.randn((3, *p.shape), dtype=p.dtype) if per_task else p.detach())
        .clone()
        .requires_grad_()
        for name, p in model.named_parameters()
    }
    assert torch_engine._suits_vmap(model, tasks, inner)
    gradients = []
    for at_most in (100_000, 0):
        monkeypatch.setattr(torch_engine, "VMAP_MAX_PARAMETERS", at_most)
        result = torch_engine.meta_result(model, parameters, tasks, inner)
        inputs = [*parameters.values(), alpha]
        first = torch.autograd.grad(result.loss, inputs, create_graph=True)
        penalty = torch.autograd.grad(sum(g.square().sum() for g in first), inputs)
        gradients.append([result.task_losses, result.logits, *first, *penalty])
    for a, e in zip(*gradients, strict=True):
        assert_close(a, e, "vmap against the loop")


def test_only_plain_linear_nets_take_vmap() -> None:
    """torch.func differentiates some functions wrongly, so nothing runs under it that has not been compared."""

    class Own(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return F.batch_norm(super().forward(x), None, None, training=True)

    linear, tasks = nn.Linear(6, 3), make_tasks((6,))
    hooked = nn.Sequential(nn.Linear(6, 3))
    hooked.register_forward_hook(lambda module, inputs, output: 2 * output)
    for model, expected in [
        (nn.Sequential(linear), True),
        (Own(linear), False),
        (hooked, False),
        (nn.Sequential(linear, nn.BatchNorm1d(3)), False),
        (nn.Sequential(linear, nn.Dropout()), False),
    ]:
        inner = InnerLoop.create(model, inner_lr=0.1)
        assert torch_engine._suits_vmap(model, tasks, inner) is expected
        assert not torch_engine._suits_vmap(model, ragged(tasks), inner)


# --- what autograd does with the loss -------------------------------------------------------------


@pytest.fixture(params=["mlp", "conv"])
def problem(request: pytest.FixtureRequest) -> tuple[nn.Module, TaskBatch]:
    """mlp goes through vmap, conv through the loop."""
    module, _, shape = NETS[request.param]
    return make(module), make_tasks(shape)


def gradients_of(model: nn.Module) -> list[Tensor]:
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    return gradients


def test_the_loss_is_an_ordinary_tensor(problem: tuple[nn.Module, TaskBatch]) -> None:
    model, tasks = problem
    alpha = torch.tensor(0.2, dtype=torch.float64, requires_grad=True)
    loss = maml_loss(model, tasks, inner_lr=alpha, inner_steps=2)
    assert loss.dim() == 0
    loss.backward(retain_graph=True)
    alpha_grad = alpha.grad.clone()
    once = gradients_of(model)
    assert len(once) == len(list(model.parameters()))
    loss.backward(retain_graph=True)  # twice: the same again, added
    assert_close(alpha.grad, 2 * alpha_grad, "α after two backward passes")
    for a, e in zip(gradients_of(model), once, strict=True):
        assert_close(a, e, "second backward")
    (3.0 * loss + loss).backward()  # used twice, scaled
    for a, e in zip(gradients_of(model), once, strict=True):
        assert_close(a, 4 * e, "scaled")


def test_the_gradient_of_a_gradient_penalty(problem: tuple[nn.Module, TaskBatch]) -> None:
    model, tasks = problem
    weight = [p for p in model.parameters() if p.dim() > 1][-1]

    def penalty() -> Tensor:
        loss = maml_loss(model, tasks, inner_lr=0.2, inner_steps=1)
        (gradient,) = torch.autograd.grad(loss, weight, create_graph=True)
        return gradient.square().sum()

    (gradient,) = torch.autograd.grad(penalty(), weight)
    direction = torch.randn(weight.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    values = []
    for step in (1e-5, -1e-5):
        with torch.no_grad():
            weight += step * direction
        values.append(penalty().detach())
        with torch.no_grad():
            weight -= step * direction
    central = (values[0] - values[1]) / 2e-5
    torch.testing.assert_close((gradient * direction).sum(), central, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("bn", ["transductive", "support"])
def test_gradients_reach_support_and_query_inputs(bn: Any) -> None:
    module, net, shape = NETS["conv"]
    model, tasks = make(module), make_tasks(shape)
    encoded = TaskBatch(
        tasks.support_x.requires_grad_(), tasks.support_y, tasks.query_x.requires_grad_(), tasks.query_y
    )
    inputs = [encoded.support_x, encoded.query_x]
    for first_order in (False, True):
        options: dict[str, Any] = {"inner_steps": 2, "bn": bn, "first_order": first_order}
        loss = maml_loss(model, encoded, inner_lr=0.3, **options)
        losses, _ = definition(net, dict(model.named_parameters()), encoded, lambda name, k: 0.3, **options)
        actual = torch.autograd.grad(loss, inputs, allow_unused=True)
        expected = torch.autograd.grad(losses.mean(), inputs, allow_unused=True)
        for a, e in zip(actual, expected, strict=True):
            assert_close(a, e, "inputs")


def test_no_graph_is_kept_without_grad(problem: tuple[nn.Module, TaskBatch]) -> None:
    model, tasks = problem
    expected = maml_loss(model, tasks, inner_lr=0.2, inner_steps=2, support_weight=0.5)
    with torch.no_grad():
        loss = maml_loss(model, tasks, inner_lr=0.2, inner_steps=2, support_weight=0.5)
    assert not loss.requires_grad
    assert_close(loss, expected.detach(), "loss")


def test_any_callable_is_a_loss() -> None:
    model, tasks = make(conv_module), ragged(make_tasks((2, 4, 4)))
    smooth = {"loss": lambda outputs, targets: F.cross_entropy(outputs, targets, label_smoothing=0.1)}
    same = {"loss": lambda outputs, targets: F.cross_entropy(outputs, targets)}
    plain = maml_loss(model, tasks, inner_lr=0.2)
    assert_close(maml_loss(model, tasks, inner_lr=0.2, **same), plain, "the same loss as a callable")
    assert abs(maml_loss(model, tasks, inner_lr=0.2, **smooth) - plain) > 1e-3


# --- names ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("adapt", "expected"),
    [
        (None, {"a.0.weight", "a.0.bias", "a.1.weight", "a.1.bias", "a1.weight", "a1.bias"}),
        ("a", {"a.0.weight", "a.0.bias", "a.1.weight", "a.1.bias"}),
        ("a1.bias", {"a1.bias"}),
        (["a.0", "a1.bias"], {"a.0.weight", "a.0.bias", "a1.bias"}),
        ("*.bias", {"a.0.bias", "a.1.bias", "a1.bias"}),
        ("a*.weight", {"a.0.weight", "a.1.weight", "a1.weight"}),  # * is any text, dots included
        ("a.?", {"a.0.weight", "a.0.bias", "a.1.weight", "a.1.bias"}),  # of a module: all under it
        ("a.[!0].weight", {"a.1.weight"}),
        (["*.0.bias", "a1"], {"a.0.bias", "a1.weight", "a1.bias"}),
    ],
)
def test_what_names_prefixes_and_patterns_adapt(adapt: Any, expected: set[str]) -> None:
    model = nn.ModuleDict({"a": nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), "a1": nn.Linear(2, 2)})
    assert set(InnerLoop.create(model, inner_lr=0.1, adapt=adapt).rates) == expected
    if adapt is not None:  # the names of a mapping of learning rates are the same kind
        rates = dict.fromkeys([adapt] if isinstance(adapt, str) else adapt, 0.1)
        assert set(InnerLoop.create(model, inner_lr=rates).rates) == expected


def test_the_longest_name_has_the_rate_and_any_name_comes_before_a_pattern() -> None:
    model = nn.Sequential(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)))
    inner = InnerLoop.create(model, inner_lr={"*weight": 3.0, "0.0.*": 4.0, "0.1": 2.0, "0.1.bias": 5.0})
    found = {name: float(rate.value) for name, rate in inner.rates.items()}
    assert found == {"0.0.weight": 3.0, "0.0.bias": 4.0, "0.1.weight": 2.0, "0.1.bias": 5.0}


@pytest.mark.parametrize(
    ("adapt", "message"),
    [
        ("0.wieght", "adapt names '0.wieght', which is no parameter of the model. Did you mean '0.weight'"),
        (
            "*.wieght",
            r"adapt names '\*.wieght', a pattern that fits no parameter of the model. Did you mean '2.weight'",
        ),
        (["0", "lora_*"], r"adapt names 'lora_\*', a pattern that fits no parameter of the model.*There are: 0.weight"),
    ],
)
def test_a_name_that_fits_nothing_raises_with_the_nearest(adapt: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        InnerLoop.create(mlp_module(), inner_lr=0.1, adapt=adapt)


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"engine": "native "}, "engine is 'native '. Did you mean 'native'"),
        ({"model": nn.Linear(6, 5)}, "tasks has 3 ways, but the model's head has 5 outputs"),
        ({"model": nn.Linear(6, 2)}, "tasks has 3 ways, but the model's head has 2 outputs"),
        ({"bn": "per-step"}, "bn is 'per-step'"),
        ({"model": nn.BatchNorm1d(6, track_running_stats=False), "bn": "running"}, "track_running_stats=False"),
    ],
)
def test_arguments_that_do_not_fit_raise(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"model": nn.Linear(6, 3), "inner_lr": 0.1, **change}
    with pytest.raises(ValueError, match=message):
        maml_loss(tasks=make_tasks((6,)).to(torch.float32), **arguments)


def test_regression_targets_are_never_broadcast() -> None:
    x = torch.zeros(2, 5, 1)
    with pytest.raises(ValueError, match=r"support_y has shape \(1, 5\), expected \(1, 5, 1\)"):
        maml_loss(nn.Linear(1, 1), TaskBatch(x, x[..., 0], x, x[..., 0]), inner_lr=0.1, loss="mse")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: p.pop("bias"), "parameters lacks 'bias'"),
        (
            lambda p: p.update(bias=torch.zeros(4, 3)),
            r"parameters\['bias'\] has shape \(4, 3\), expected \(3,\), or \(3, 3\)",
        ),
    ],
)
def test_parameters_that_do_not_fit_raise(change: Callable[[dict[str, Any]], Any], message: str) -> None:
    model = nn.Linear(6, 3)
    parameters = dict(model.named_parameters())
    change(parameters)
    with pytest.raises(ValueError, match=message):
        torch_engine.meta_result(model, parameters, make_tasks((6,)), InnerLoop.create(model, inner_lr=0.1))
