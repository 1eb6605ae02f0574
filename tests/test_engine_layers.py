"""Every layer of the native engine, in the forms that it comes in, inside a small network: losses, outputs and all
gradients are the torch engine's, in float64. By the plain layers, which are the specification of the specialised paths,
and by these, forced wherever they apply."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from statistics import median
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from innerloop import TaskBatch, native_engine, torch_engine
from innerloop.inner_loop import InnerLoop, Rate
from innerloop.ops import maml as native
from nets import make, make_tasks, ragged

PLAIN, SPECIALISED = (0, 0, 0, 0, 0, 0), (2, 2, 2, 2, 2, 2)
IMAGE = (2, 7, 6)
VECTOR = (6,)


def head(features: int) -> list[nn.Module]:
    return [nn.Flatten(), nn.Linear(features, 3)]


def on_images(*layers: nn.Module, channels: int = 3) -> nn.Module:
    """The layers between a convolution of 7 × 6 images, whose output moves and needs a gradient, and a head."""
    body = nn.Sequential(nn.Conv2d(2, channels, 3, padding=1), *layers)
    return nn.Sequential(*body, *head(body(torch.zeros(2, *IMAGE)).flatten(1).shape[1]))


def on_vectors(*layers: nn.Module) -> nn.Module:
    """The layers between two linear ones."""
    return nn.Sequential(nn.Linear(6, 5), *layers, nn.Linear(5, 3))


def on_data(*layers: nn.Module) -> nn.Module:
    """The layers on 7 × 6 images as they come, which neither move nor need a gradient, and a head."""
    body = nn.Sequential(*layers)
    return nn.Sequential(*body, *head(body(torch.zeros(2, *IMAGE)).flatten(1).shape[1]))


def block(inputs: int, outputs: int, stride: int = 1) -> list[nn.Module]:
    """Of the few-shot papers' convolutional networks."""
    conv = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1)
    return [conv, nn.BatchNorm2d(outputs), nn.ReLU(), nn.MaxPool2d(2)]


class Sum(nn.Module):
    """branch(x) + other(x); without other: + x itself."""

    def __init__(self, branch: nn.Module, other: nn.Module | None = None) -> None:
        super().__init__()
        self.branch = branch
        self.other = nn.Identity() if other is None else other

    def forward(self, x: Tensor) -> Tensor:
        return self.branch(x) + self.other(x)


class Fan(nn.Module):
    """One value read by three layers: with a halo of 2, with one of 1, and with none."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Conv2d(3, 3, 5, padding=2)
        self.pool = nn.MaxPool2d(3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.wide(x) + self.pool(x) + torch.tanh(x)


Net = tuple[Callable[[], nn.Module], tuple[int, ...]]


def conv(*arguments: Any, **options: Any) -> Net:
    return lambda: on_images(nn.Conv2d(3, 4, *arguments, **options)), IMAGE


def image(layer: Callable[[], nn.Module], **options: Any) -> Net:
    return lambda: on_images(layer(), **options), IMAGE


def vector(layer: Callable[[], nn.Module]) -> Net:
    return lambda: on_vectors(layer()), VECTOR


def data(*layers: Callable[[], nn.Module]) -> Net:
    return lambda: on_data(*(layer() for layer in layers)), IMAGE


# Where the parameters end in 3, 4, 5 or 20 channels, the last vector of a row is partly padding.
NETS: dict[str, Net] = {
    "linear": (lambda: nn.Sequential(nn.Linear(6, 3)), VECTOR),
    "linear, no bias": (lambda: nn.Sequential(nn.Linear(6, 9, bias=False), nn.Linear(9, 3, bias=False)), VECTOR),
    "linear, wide": (lambda: nn.Sequential(nn.Linear(130, 67), nn.Tanh(), nn.Linear(67, 3)), (130,)),
    "linear, three in a row": (lambda: on_vectors(nn.Linear(5, 20), nn.Linear(20, 5)), VECTOR),
    "conv2d on data": data(lambda: nn.Conv2d(2, 4, 3, padding=1)),
    "conv2d on data, stride 2": data(lambda: nn.Conv2d(2, 4, 3, stride=2, padding=1, bias=False)),
    "conv2d 3 × 3": conv(3, padding=1),
    "conv2d 3 × 3, no padding": conv(3),
    "conv2d 3 × 3, padding 2": conv(3, padding=2),
    "conv2d 3 × 3, stride 2": conv(3, stride=2, padding=1),
    "conv2d 3 × 3, stride 2, no padding": conv(3, stride=2),
    "conv2d 3 × 3, no bias": conv(3, padding=1, bias=False),
    "conv2d 1 × 1": conv(1),
    "conv2d 1 × 1, padding 1": conv(1, padding=1),
    "conv2d 1 × 1, stride 3: most pixels are not read": conv(1, stride=3),
    "conv2d 2 × 2, stride 2": conv(2, stride=2),
    "conv2d 5 × 2, stride 2 × 1, padding 1 × 0": conv((5, 2), stride=(2, 1), padding=(1, 0)),
    "conv2d as large as the image": conv((7, 6)),
    "conv2d, many channels": (lambda: on_images(nn.Conv2d(20, 17, 3, padding=1), channels=20), IMAGE),
    "batch_norm on images": image(lambda: nn.BatchNorm2d(3)),
    "batch_norm on images, not affine": image(lambda: nn.BatchNorm2d(3, affine=False)),
    "batch_norm, eps 0.1": image(lambda: nn.BatchNorm2d(3, eps=0.1)),
    "batch_norm, many channels": image(lambda: nn.BatchNorm2d(20), channels=20),
    "batch_norm on vectors": vector(lambda: nn.BatchNorm1d(5)),
    "batch_norm on vectors, not affine": vector(lambda: nn.BatchNorm1d(5, affine=False)),
    "batch_norm on data": data(lambda: nn.BatchNorm2d(2), lambda: nn.Conv2d(2, 3, 3, padding=1)),
    "batch_norm, two in a row": image(
        lambda: nn.Sequential(nn.BatchNorm2d(3), nn.Tanh(), nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    ),
    "layer_norm on images": image(lambda: nn.LayerNorm([3, 7, 6])),
    "layer_norm on images, not affine": image(lambda: nn.LayerNorm([3, 7, 6], elementwise_affine=False)),
    "layer_norm on vectors": vector(lambda: nn.LayerNorm(5)),
    "layer_norm on vectors, no bias": vector(lambda: nn.LayerNorm(5, bias=False)),
    "layer_norm on data": data(lambda: nn.LayerNorm([2, 7, 6])),
    "group_norm, one group": image(lambda: nn.GroupNorm(1, 3)),
    "group_norm, two groups of many channels": image(lambda: nn.GroupNorm(2, 20), channels=20),
    "group_norm, a group for each channel": image(lambda: nn.GroupNorm(3, 3)),
    "group_norm, not affine": image(lambda: nn.GroupNorm(3, 3, affine=False)),
    "group_norm on vectors": vector(lambda: nn.GroupNorm(1, 5)),
    "relu on images": image(nn.ReLU),
    "relu on vectors": vector(nn.ReLU),
    "leaky_relu": image(lambda: nn.LeakyReLU(0.1)),
    "gelu by erf": image(nn.GELU),
    "gelu by tanh": image(lambda: nn.GELU(approximate="tanh")),
    "tanh": image(nn.Tanh),
    "sigmoid on images": image(nn.Sigmoid),
    "sigmoid on vectors": vector(nn.Sigmoid),
    "max_pool": image(lambda: nn.MaxPool2d(2)),
    "max_pool, overlapping, padded": image(lambda: nn.MaxPool2d(3, 2, 1)),
    "max_pool 3 × 2, stride 1 × 3, padding 1 × 0": image(lambda: nn.MaxPool2d((3, 2), (1, 3), (1, 0))),
    "max_pool on data": data(lambda: nn.MaxPool2d(2), lambda: nn.Conv2d(2, 3, 3)),
    "avg_pool": image(lambda: nn.AvgPool2d(2)),
    "avg_pool, overlapping, padding counts": image(lambda: nn.AvgPool2d(3, 2, 1)),
    "avg_pool, overlapping, padding does not count": image(lambda: nn.AvgPool2d(3, 2, 1, count_include_pad=False)),
    "avg_pool 3 × 2, stride 1 × 3, padding 1 × 0": image(lambda: nn.AvgPool2d((3, 2), (1, 3), (1, 0))),
    "global_avg_pool": image(lambda: nn.AdaptiveAvgPool2d(1)),
    "flatten of data": (lambda: nn.Sequential(*head(84)), IMAGE),
    "flatten of a sequence": (lambda: nn.Sequential(*head(6)), (2, 3)),
    "flatten of vectors": vector(nn.Flatten),
    "add: a residual": image(lambda: Sum(nn.Conv2d(3, 3, 3, padding=1))),
    "add: two branches": image(
        lambda: Sum(nn.Conv2d(3, 4, 1, bias=False), nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Tanh()))
    ),
    "add: a value and itself": image(lambda: nn.Sequential(nn.Tanh(), Sum(nn.Identity()))),
    "add: on data, of which one part moves": data(lambda: Sum(nn.Conv2d(2, 2, 3, padding=1))),
    "add on vectors": vector(lambda: Sum(nn.Linear(5, 5))),
    "a value with three readers": image(Fan),
    "two convolution blocks": image(lambda: nn.Sequential(*block(3, 4), *block(4, 5))),
    "two convolution blocks, stride 2": image(lambda: nn.Sequential(*block(3, 4, 2)[:3], *block(4, 5, 2)[:3])),
}


# --- the inner loops ------------------------------------------------------------------------------

Settings = dict[str, Any]
PER_STEP, PER_ELEMENT, BOTH = (True, False), (False, True), (True, True)  # of α
SETTINGS: dict[str, Settings] = {
    "1 step": {"steps": 1},
    "3 steps, all losses": {"steps": 3, "w": [0.5, -0.25, 2.0, 1.5], "u": 0.7, "α": PER_STEP},
    "2 steps, masks": {"steps": 2, "w": [0.5, 1.0, 2.0], "α": PER_ELEMENT, "ragged": True},
    "2 steps, first order": {"steps": 2, "w": [0.0, 1.0, 2.0], "u": 0.7, "first_order": True, "α": BOTH},
    "no step": {"steps": 0, "u": 0.5},
    "head alone adapted": {"steps": 2, "w": [0.5, 1.0, 2.0], "u": 0.7, "adapt": "last", "α": PER_STEP},
    "all but the head adapted": {"steps": 2, "u": 0.7, "adapt": "first", "α": BOTH},
    "own parameters for each task": {"steps": 2, "w": [0.5, 1.0, 2.0], "per_task": True, "ragged": True},
    "mean squared error": {"steps": 2, "regression": True, "α": PER_STEP},
}
MODES: dict[str, Settings] = {
    f"{name}, bn {mode}": {**SETTINGS[name], "bn": mode}
    for mode in ("support", "running")
    for name in SETTINGS
    if name != "mean squared error"
}


def inner_loop(model: nn.Module, settings: Settings) -> InnerLoop:
    """The settings for a model, with an α of its own for every adapted parameter, to be learned."""
    names = [name for name, _ in model.named_parameters()]
    last = names[-1].rpartition(".")[0]
    adapted = {
        "last": [name for name in names if name.startswith(last)],
        "first": [name for name in names if not name.startswith(last)] or names,
        "all": names,
    }[settings.get("adapt", "all")]
    inner = InnerLoop.create(
        model,
        inner_lr=0.1,
        adapt=adapted,
        inner_steps=settings["steps"],
        step_weights=settings.get("w"),
        support_weight=settings.get("u", 0.0),
        first_order=settings.get("first_order", False),
        bn=settings.get("bn", "transductive"),
        loss="mse" if settings.get("regression") else "cross_entropy",
    )
    torch.manual_seed(5)
    rates = {}
    for name in inner.rates:
        parameter = model.get_parameter(name)
        per_step, per_element = settings.get("α", (False, False))
        shape = ((inner.steps,) if per_step else ()) + (parameter.shape if per_element else ())
        rates[name] = Rate((0.05 + 0.2 * torch.rand(shape)).to(parameter.dtype).requires_grad_(), per_step)
    return dataclasses.replace(inner, rates=rates)


def tensors_of(model: nn.Module, settings: Settings, tasks: int) -> dict[str, Tensor]:
    """θ₀ to differentiate in; where each task has its own, that of the first and the last parameter."""
    parameters = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    if settings.get("per_task"):
        torch.manual_seed(6)
        for name in {next(iter(parameters)), list(parameters)[-1]}:
            value = parameters[name]
            parameters[name] = value + 0.1 * torch.randn(tasks, *value.shape, dtype=value.dtype)
    return {name: value.requires_grad_() for name, value in parameters.items()}


Outcome = dict[str, Tensor]


def gradients_of(loss: Tensor, parameters: dict[str, Tensor], inner: InnerLoop) -> Outcome:
    inputs = {**parameters, **{f"α of {name}": rate.value for name, rate in inner.rates.items()}}
    gradients = torch.autograd.grad(loss, list(inputs.values()), allow_unused=True)
    return {
        name: torch.zeros_like(value) if gradient is None else gradient
        for (name, value), gradient in zip(inputs.items(), gradients, strict=True)
    }


def by_torch(model: nn.Module, parameters: dict[str, Tensor], tasks: TaskBatch, inner: InnerLoop) -> Outcome:
    result = torch_engine.meta_result(model, parameters, tasks, inner)
    return {
        "task losses": result.task_losses,
        "outputs": result.logits,
        **gradients_of(result.loss, parameters, inner),
    }


def by_native(
    model: nn.Module, parameters: dict[str, Tensor], tasks: TaskBatch, inner: InnerLoop, paths: tuple[int, ...] = PLAIN
) -> Outcome:
    call = native_engine.native_call(model, tasks, inner, parameters)
    loss, task_losses, outputs = native.maml(*call[:-1], dataclasses.replace(call[-1], paths=paths))
    return {"task losses": task_losses, "outputs": outputs, **gradients_of(loss, parameters, inner)}


def largest_gradient(outcome: Outcome) -> float:
    return max(float(value.abs().max()) for name, value in outcome.items() if name not in ("task losses", "outputs"))


def assert_same(actual: Outcome, expected: Outcome, tolerance: float = 1e-9) -> None:
    """Each within tolerance of its largest entry. A gradient that is 0 but for rounding (that of a bias before
    BatchNorm) is measured by the others."""
    largest = largest_gradient(expected)
    for name, value in expected.items():
        scale = max(float(value.abs().max()), 1e-5 * largest)
        error = float((actual[name] - value).abs().max()) / scale
        assert error <= tolerance, f"{name}: relative error {error:.1e}"


def check(net: Net, settings: Settings, paths: tuple[int, ...]) -> None:
    module, shape = net
    model = make(module)
    tasks = make_tasks(shape, tasks=2, out=3 if settings.get("regression") else None)
    if settings.get("ragged"):
        tasks = ragged(tasks)
    parameters = tensors_of(model, settings, tasks.num_tasks)
    inner = inner_loop(model, settings)
    assert_same(by_native(model, parameters, tasks, inner, paths), by_torch(model, parameters, tasks, inner))


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("net", NETS.values(), ids=NETS)
def test_a_layer_computes_what_the_torch_engine_does(net: Net, settings: Settings) -> None:
    check(net, settings, PLAIN)


@pytest.mark.parametrize("settings", MODES.values(), ids=MODES)
@pytest.mark.parametrize("net", [name for name in NETS if name.startswith("batch_norm")])
def test_batch_norm_has_three_modes(net: str, settings: Settings) -> None:
    check(NETS[net], settings, PLAIN)


SPECIALISED_SETTINGS = {**SETTINGS, **MODES}


@pytest.mark.parametrize("settings", SPECIALISED_SETTINGS.values(), ids=SPECIALISED_SETTINGS)
@pytest.mark.parametrize("net", [name for name in NETS if name.startswith(("linear", "two convolution blocks"))])
def test_the_specialised_paths_compute_the_same(net: str, settings: Settings) -> None:
    check(NETS[net], settings, SPECIALISED)


@pytest.mark.parametrize("net", [name for name in NETS if name.startswith(("conv2d", "max_pool", "add"))])
def test_so_do_specialised_convolutions(net: str) -> None:
    check(NETS[net], SETTINGS["3 steps, all losses"], SPECIALISED)


# --- float32 --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("net", "limit"),
    [
        ("linear, wide", 2),
        ("batch_norm, many channels", 2),
        ("conv2d on data", 2),
        ("conv2d 3 × 3", 2),
        ("batch_norm on images", 2),
        ("layer_norm on images, not affine", 2),
        ("gelu by erf", 2),
        ("avg_pool", 2),
        ("leaky_relu", 3),  # near its kink, and near a tie of a pool, rounding decides which slope counts
        ("max_pool", 3),
    ],
)
def test_float32_is_as_close_to_float64_as_torch_is(net: str, limit: float) -> None:
    settings = {"steps": 2, "w": [0.5, 1.0, 2.0], "u": 0.7, "α": PER_STEP}
    module, shape = NETS[net]
    errors: dict[Any, list[float]] = {by_native: [], by_torch: []}
    for seed in range(20):
        model = make(module, seed).float()
        tasks = make_tasks(shape, tasks=2, seed=seed).to(torch.float32)
        exact = copy.deepcopy(model).double()
        expected = by_torch(exact, tensors_of(exact, settings, 2), tasks.to(torch.float64), inner_loop(exact, settings))
        for by, found in errors.items():
            actual = by(model, tensors_of(model, settings, 2), tasks, inner_loop(model, settings))
            difference = {name: actual[name] - value for name, value in expected.items()}
            found.append(largest_gradient(difference) / largest_gradient(expected))
    assert median(errors[by_native]) <= limit * median(errors[by_torch])


# --- values that random draws do not reach --------------------------------------------------------


def flat_images() -> TaskBatch:
    """Tasks of binary images with large areas of 0 and of 1: most windows of a pool hold ties."""
    tasks = make_tasks(IMAGE, tasks=2)
    g = torch.Generator().manual_seed(3)

    def flat(x: Tensor) -> Tensor:
        coarse = torch.rand(*x.shape[:3], 4, 3, generator=g) < 0.5
        return coarse.repeat_interleave(2, 3).repeat_interleave(2, 4)[..., :7, :6].to(x)

    return TaskBatch(flat(tasks.support_x), tasks.support_y, flat(tasks.query_x), tasks.query_y)


def tied() -> nn.Module:
    """The convolution sums two channels with equal weights: (0, 1) and (1, 0) tie, and which of them a pool takes
    decides which weight gets the gradient."""
    model = nn.Sequential(nn.Conv2d(2, 3, 1), nn.MaxPool2d(3, 2, 1), *head(36))
    with torch.no_grad():
        model[0].weight.fill_(0.5)
    return model


@pytest.mark.parametrize("first_order", [False, True], ids=["second order", "first order"])
def test_of_tied_elements_max_pool_takes_the_first(first_order: bool) -> None:
    settings = {"steps": 1, "w": [1.0, 1.0], "u": 0.7, "first_order": first_order}
    model, tasks = make(tied), flat_images()
    parameters, inner = tensors_of(model, settings, 2), inner_loop(model, settings)
    assert_same(by_native(model, parameters, tasks, inner), by_torch(model, parameters, tasks, inner))


def test_relu_has_slope_0_at_0() -> None:
    settings = {"steps": 2, "w": [1.0, 1.0, 1.0], "u": 0.7}
    model, tasks = make(lambda: on_images(nn.ReLU())), make_tasks(IMAGE, tasks=2)
    with torch.no_grad():  # the first channel is 0 everywhere
        model[0].weight[0] = 0
        model[0].bias[0] = 0
    parameters, inner = tensors_of(model, settings, 2), inner_loop(model, settings)
    assert_same(by_native(model, parameters, tasks, inner), by_torch(model, parameters, tasks, inner))


@pytest.mark.parametrize("layer", [nn.ReLU, nn.Tanh, lambda: nn.MaxPool2d(2), lambda: nn.AvgPool2d(2)])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_spreads_as_in_torch(layer: Callable[[], nn.Module], value: float) -> None:
    model, tasks = make(lambda: on_data(layer())), make_tasks(IMAGE, tasks=2)
    tasks.query_x[0, 1, 0, 2, 3] = value
    settings = {"steps": 1}
    parameters, inner = tensors_of(model, settings, 2), inner_loop(model, settings)
    actual, expected = (by(model, parameters, tasks, inner)["outputs"] for by in (by_native, by_torch))
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-12, equal_nan=True)
    assert actual[1].isfinite().all()
    assert actual[0, [0, 2, 3, 4]].isfinite().all()
