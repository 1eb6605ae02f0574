"""The native engine against the torch engine in float64: its specification.

Networks, shapes, settings and tasks are drawn; both engines must agree to 1e-9 relative in the loss, the outputs and
the gradients of parameters and learned α. Beside it the table of what must never be silently wrong. Each layer by its
name: test_engine_layers.py.
"""

from __future__ import annotations

import copy
import logging
import pickle
import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.autograd import forward_ad

import innerloop
from innerloop import Result, TaskBatch, engine, native_engine, torch_engine
from innerloop.inner_loop import InnerLoop
from innerloop.ops import maml as native
from nets import assert_close, make, make_tasks, ragged

# --- the space of networks ------------------------------------------------------------------------


class Added(nn.Module):
    """Two branches added: the smallest graph that is no chain."""

    def __init__(self, left: nn.Module, right: nn.Module) -> None:
        super().__init__()
        self.left, self.right = left, right

    def forward(self, x: Tensor) -> Tensor:
        return self.left(x) + self.right(x)


ACTIVATIONS: list[Callable[[], nn.Module]] = [
    nn.ReLU,
    lambda: nn.LeakyReLU(0.1),
    nn.GELU,
    lambda: nn.GELU(approximate="tanh"),
    nn.Tanh,
    nn.Sigmoid,
]

draws = st.integers
# Of 8, whole vectors, values share their memory with others.
CHANNELS = st.sampled_from([1, 2, 3, 4, 5, 7, 8, 8, 8])


@st.composite
def image_layers(draw: st.DrawFn, channels: int, height: int, width: int) -> tuple[list[nn.Module], int]:
    """(layers on images, features after them)."""
    layers: list[nn.Module] = []
    for _ in range(draw(draws(1, 3))):
        out = draw(CHANNELS)
        kernel = draw(st.sampled_from([(1, 1), (2, 2), (3, 3), (3, 1), (5, 5)]))
        padding = (draw(draws(0, 2)), draw(draws(0, 2)))
        stride = draw(st.sampled_from([(1, 1), (1, 1), (2, 2), (1, 2)]))
        sizes = [(n + 2 * p - k) // s + 1 for n, p, k, s in zip((height, width), padding, kernel, stride, strict=True)]
        if min(height + 2 * padding[0] - kernel[0], width + 2 * padding[1] - kernel[1]) < 0:
            break
        layers.append(nn.Conv2d(channels, out, kernel, stride, padding, bias=draw(st.booleans())))
        channels, (height, width) = out, sizes
        norm = draw(st.sampled_from(["none", "batch", "batch plain", "group", "layer"]))
        if norm.startswith("batch"):
            layers.append(nn.BatchNorm2d(channels, affine=norm == "batch", eps=1e-2))
        elif norm == "group":
            groups = channels if draw(st.booleans()) else 1
            layers.append(nn.GroupNorm(groups, channels, eps=1e-2))
        elif norm == "layer":
            layers.append(nn.LayerNorm([channels, height, width], eps=1e-2, elementwise_affine=draw(st.booleans())))
        if draw(st.booleans()):
            body = nn.Conv2d(channels, channels, 3, padding=1)
            layers.append(Added(body, nn.Identity() if draw(st.booleans()) else nn.Conv2d(channels, channels, 1)))
        layers.append(draw(st.sampled_from(ACTIVATIONS))())
        pool = draw(st.sampled_from(["none", "max", "max overlapping", "avg", "avg padded"]))
        if pool != "none" and min(height, width) >= 3:
            made: nn.Module = {
                "max": lambda: nn.MaxPool2d(2),
                "max overlapping": lambda: nn.MaxPool2d(3, stride=2, padding=1),
                "avg": lambda: nn.AvgPool2d((2, 1)),
                "avg padded": lambda: nn.AvgPool2d(3, stride=1, padding=1, count_include_pad=False),
            }[pool]()
            layers.append(made)
            height, width = made(torch.zeros(1, 1, height, width)).shape[2:]
    if draw(st.booleans()):
        layers.append(nn.AdaptiveAvgPool2d(1))
        height = width = 1
    return [*layers, nn.Flatten()], channels * height * width


@st.composite
def networks(draw: st.DrawFn, outputs: int) -> tuple[nn.Module, tuple[int, ...]]:
    """(a network, the shape of its samples)."""
    layers: list[nn.Module] = []
    if draw(st.booleans()):
        shape: tuple[int, ...] = (draw(draws(1, 3)), draw(draws(3, 8)), draw(draws(3, 8)))
        layers, features = draw(image_layers(*shape))
    else:
        shape = (draw(draws(1, 6)),)
        features = shape[0]
    for _ in range(draw(draws(0, 2))):
        width = draw(CHANNELS)
        layers.append(nn.Linear(features, width, bias=draw(st.booleans())))
        norm = draw(st.sampled_from(["none", "none", "batch", "layer"]))
        if norm != "none":
            layers.append(nn.BatchNorm1d(width, eps=1e-2) if norm == "batch" else nn.LayerNorm(width, eps=1e-2))
        layers.append(draw(st.sampled_from(ACTIVATIONS))())
        if draw(st.booleans()):
            layers.append(Added(nn.Linear(width, width), nn.Identity()))
        features = width
    layers.append(nn.Linear(features, outputs))
    return nn.Sequential(*layers), shape


# --- the space of settings ------------------------------------------------------------------------


@dataclass
class Case:
    model: nn.Module
    tasks: TaskBatch
    parameters: dict[str, Tensor]
    inner: InnerLoop
    learned: list[Tensor]
    paths: tuple[int, ...] = native.AUTOMATIC

    def run(self, meta_result: Callable[..., Any]) -> tuple[Any, tuple[Tensor | None, ...]]:
        result = meta_result(self)
        inputs = [value for value in [*self.parameters.values(), *self.learned] if value.requires_grad]
        if not inputs or not result.loss.requires_grad:
            return result, ()
        return result, torch.autograd.grad(result.loss, inputs, allow_unused=True)


def by_torch(case: Case) -> Result:
    return torch_engine.meta_result(case.model, case.parameters, case.tasks, case.inner)


def by_native(case: Case) -> Result:
    call = native_engine.native_call(case.model, case.tasks, case.inner, case.parameters)
    *tensors, settings_ = call
    return Result(*native.maml(*tensors, replace(settings_, paths=case.paths)))


def rates(kind: str, model: nn.Module, steps: int, scale: float) -> tuple[Any, list[Tensor]]:
    """(inner_lr as a user writes it, the tensors that are learned)."""

    def learned(*shape: int) -> Tensor:
        return (scale * (0.5 + torch.rand(shape, dtype=torch.float64))).requires_grad_()

    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    if kind == "number":
        return scale, []
    if kind == "0-d":
        one = learned()
        return one, [one]
    if kind == "[K]":
        each = learned(steps)
        return each, [each]
    if kind == "prefix":
        prefix = next(iter(shapes)).partition(".")[0]
        each = learned(steps)
        return {prefix: each}, [each]
    if kind == "parameter-shaped":
        # Where K numbers would fit too, InnerLoop asks for [K, *parameter].
        shaped = {name: learned(*s) if s != (steps,) else learned(steps, *s) for name, s in shapes.items()}
        return shaped, list(shaped.values())
    full = {name: learned(steps, *s) for name, s in shapes.items()}
    return full, list(full.values())


RATES = ["number", "0-d", "[K]", "prefix", "parameter-shaped", "[K, *parameter]"]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    seed = draw(draws(0, 2**31 - 1))
    ways = draw(draws(2, 4))
    regression = draw(st.booleans())
    torch.manual_seed(seed)
    module, shape = draw(networks(ways))
    model = make(lambda: module, seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    steps = draw(st.sampled_from([0, 1, 1, 2, 3, 5, 10]))
    count = draw(draws(1, 5))
    # At least two valid samples of each set: torch's BatchNorm refuses the statistics of one.
    support, query = draw(draws(max(ways, 3), 7)), draw(draws(max(ways, 3), 7))
    tasks = random_tasks(shape, count, support, query, ways, regression, seed)
    if draw(st.booleans()) and tasks.support_y.shape[1] > ways:
        tasks = masked(tasks)
        # The last class may have lost all its samples, and the head would have an output too many.
        assume(regression or tasks.ways == ways)
    inner_lr, learned = rates(draw(st.sampled_from(RATES)), model, steps, draw(st.sampled_from([0.001, 0.01, 0.05])))
    names = [name for name, _ in model.named_parameters()]
    adapt = draw(st.sampled_from([None, None, names[-2:], names[:1]]))
    if isinstance(inner_lr, dict) and adapt is not None:
        adapt = None
    smoothing = draw(st.sampled_from([0.0, 0.0, 0.1]))
    inner = InnerLoop.create(
        model,
        inner_lr=inner_lr,
        inner_steps=steps,
        step_weights=draw(st.sampled_from([None, [draw(st.floats(-1, 1)) for _ in range(steps + 1)]])),
        support_weight=draw(st.sampled_from([0.0, 0.7])),
        adapt=adapt,
        first_order=draw(st.booleans()),
        bn=draw(st.sampled_from(["transductive", "support", "running"])),
        loss="mse" if regression else nn.CrossEntropyLoss(label_smoothing=smoothing) if smoothing else "cross_entropy",
    )
    parameters = {name: p.detach().clone() for name, p in model.named_parameters()}
    for name in parameters:
        if draw(draws(0, 5)) == 0:  # θ₀ of each task
            noise = 0.1 * torch.randn(count, *parameters[name].shape, dtype=torch.float64)
            parameters[name] = parameters[name] + noise
        parameters[name].requires_grad_(draw(draws(0, 5)) > 0)
    # Each specialised path chosen by cost, off, or forced where it applies.
    paths = tuple(draw(st.sampled_from([1, 1, 0, 2])) for _ in native.AUTOMATIC)
    return Case(model, tasks, parameters, inner, learned, paths)


def random_tasks(
    shape: tuple[int, ...], count: int, support: int, query: int, ways: int, regression: bool, seed: int
) -> TaskBatch:
    g = torch.Generator().manual_seed(seed)

    def side(samples: int) -> tuple[Tensor, Tensor]:
        x = torch.randn(count, samples, *shape, generator=g, dtype=torch.float64)
        if regression:
            return x, torch.randn(count, samples, ways, generator=g, dtype=torch.float64)
        # Every class appears, so that the tasks have as many ways as the head has outputs.
        return x, torch.stack([torch.randperm(samples, generator=g) % ways for _ in range(count)])

    return TaskBatch(*side(support), *side(query))


def masked(tasks: TaskBatch) -> TaskBatch:
    """The last support sample of every other task is padding, of NaN; in the first task the first query too."""
    count, support = tasks.support_y.shape[:2]
    support_mask = torch.ones(count, support, dtype=torch.bool)
    query_mask = torch.ones(tasks.query_y.shape[:2], dtype=torch.bool)
    support_mask[::2, -1] = False
    query_mask[0, 0] = False
    support_x, query_x = tasks.support_x.clone(), tasks.query_x.clone()
    support_x[~support_mask] = torch.nan
    query_x[~query_mask] = torch.nan
    return TaskBatch(support_x, tasks.support_y, query_x, tasks.query_y, support_mask, query_mask)


def bias_before_batch_norm(model: nn.Module) -> set[str]:
    """Biases of layers that a BatchNorm reads: where it takes the batch's mean, their gradient is rounding noise."""
    names = set()
    layers = [(name, module) for name, module in model.named_modules() if not list(module.children())]
    for (name, layer), (_, norm) in pairwise(layers):
        if isinstance(norm, (nn.BatchNorm1d, nn.BatchNorm2d)) and isinstance(layer, (nn.Linear, nn.Conv2d)):
            names.add(f"{name}.bias")
    return names


def assert_agree(case: Case) -> None:
    expected, expected_gradients = case.run(by_torch)
    actual, gradients = case.run(by_native)
    if not torch.isfinite(expected.loss):
        assert not torch.isfinite(actual.loss)
        return
    assert_close(actual.loss, expected.loss, "loss")
    assert_close(actual.task_losses, expected.task_losses, "task_losses")
    assert_close(actual.logits, expected.logits, "logits")
    names = [name for name, value in case.parameters.items() if value.requires_grad]
    names += [f"α {index}" for index in range(len(case.learned))]
    noisy = bias_before_batch_norm(case.model)
    scale = max((float(e.abs().max()) for e in expected_gradients if e is not None and e.numel()), default=1.0)
    for name, a, e in zip(names, gradients, expected_gradients, strict=False):
        if e is not None and e.numel() == 0:  # α of no steps
            continue
        if name in noisy or e is None or float(e.abs().max()) < 1e-8 * scale:
            # Rounding noise, or no part of the loss: nothing to be relative to.
            difference = (0 if a is None else a) - (0 if e is None else e)
            assert float(torch.as_tensor(difference).abs().max()) <= 1e-9 * max(scale, 1.0), name
        else:
            assert_close(a, e, name)


COMMON = settings(deadline=None, suppress_health_check=list(HealthCheck), derandomize=True, database=None)


@settings(COMMON, max_examples=60)
@given(cases())
def test_the_engines_agree(case: Case) -> None:
    assert_agree(case)


@pytest.mark.slow
@settings(COMMON, max_examples=2000)
@given(cases())
def test_the_engines_agree_over_many_draws(case: Case) -> None:
    assert_agree(case)


# --- where the samples lie ------------------------------------------------------------------------

# Of whole vectors in any instruction set, which the engine reads in torch's memory; of others, which it copies.
READERS: dict[str, Callable[[], nn.Module]] = {
    "a layer": lambda: nn.Sequential(nn.Linear(16, 4), nn.Tanh(), nn.Linear(4, 3)),
    "two layers": lambda: nn.Sequential(Added(nn.Linear(16, 4), nn.Linear(16, 4)), nn.Tanh(), nn.Linear(4, 3)),
    "an addition": lambda: nn.Sequential(Added(nn.Linear(16, 16), nn.Identity()), nn.Tanh(), nn.Linear(16, 3)),
    "a norm": lambda: nn.Sequential(nn.BatchNorm1d(16), nn.Linear(16, 4), nn.Tanh(), nn.Linear(4, 3)),
    "a layer of 15": lambda: nn.Sequential(nn.Linear(15, 4), nn.Tanh(), nn.Linear(4, 3)),
}


@pytest.mark.parametrize("low_rank", [0, 2], ids=["plain", "low rank"])
@pytest.mark.parametrize("adapt", ["all", "the head"])
@pytest.mark.parametrize("masks", ["", "support", "query", "support query"])
@pytest.mark.parametrize("reader", READERS)
def test_samples_wherever_they_lie(force: Any, reader: str, masks: str, adapt: str, low_rank: int) -> None:
    model = make(READERS[reader])
    inputs = 15 if "15" in reader else 16
    plain = make_tasks((inputs,))

    def elsewhere(x: Tensor) -> Tensor:
        """The same numbers in memory that starts in the middle of a vector and ends with the last of them."""
        return torch.cat([x.new_zeros(1), x.flatten()])[1:].view_as(x)

    support, query = ragged(plain) if "support" in masks else plain, ragged(plain) if "query" in masks else plain
    tasks = TaskBatch(
        elsewhere(support.support_x),
        support.support_y,
        elsewhere(query.query_x),
        query.query_y,
        support.support_mask,
        query.query_mask,
    )
    head = None if adapt == "all" else str(len(model) - 1)
    inner = InnerLoop.create(model, inner_lr=0.1, inner_steps=2, support_weight=0.3, adapt=head)
    force((0, low_rank, 0, 0, 0, 1))
    found = []
    for engine_name in ("native", "torch"):
        result = engine.meta_result(model, tasks, inner, None, engine_name)
        result.loss.backward()
        found.append([result.loss, result.logits, *gradients_of(model)])
    for actual, expected in zip(*found, strict=True):
        assert_close(actual, expected, reader)


# --- nothing is silently wrong --------------------------------------------------------------------


def mlp() -> nn.Module:
    return make(lambda: nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)))


def loss_of(model: nn.Module, tasks: TaskBatch, **options: Any) -> Tensor:
    return innerloop.maml_loss(model, tasks, **{"inner_lr": 0.1, "inner_steps": 2, "engine": "native", **options})


def gradients_of(model: nn.Module) -> list[Tensor]:
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    return gradients


def test_the_loss_is_an_ordinary_tensor() -> None:
    model, tasks = mlp(), make_tasks((6,))
    alpha = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    loss = loss_of(model, tasks, inner_lr=alpha)
    loss.backward(retain_graph=True)
    once, alpha_once = gradients_of(model), alpha.grad.clone()
    loss.backward(retain_graph=True)  # again
    assert_close(alpha.grad, 2 * alpha_once, "α")
    for a, e in zip(gradients_of(model), once, strict=True):
        assert_close(a, e, "second backward")
    (3.0 * loss + loss).backward()  # used twice, scaled
    for a, e in zip(gradients_of(model), once, strict=True):
        assert_close(a, 4 * e, "scaled")
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()
    two = loss_of(model, tasks) + loss_of(model, tasks, first_order=True)
    (2.0 * two).backward()
    assert len(gradients_of(model)) == len(once)


def raw_outputs(model: nn.Module, tasks: TaskBatch) -> list[Tensor]:
    """What torch.ops.innerloop.maml returns where nothing of ours stands before it."""
    options = {"step_weights": None, "support_weight": 0.0, "adapt": None, "first_order": False}
    inner = InnerLoop.create(model, inner_lr=0.1, bn="transductive", loss="cross_entropy", **options)
    parameters, rates_, buffers, _, settings_ = native_engine.native_call(model, tasks, inner)
    return native._call(parameters, rates_, buffers, tasks, settings_, [True] * len(parameters), False)


@pytest.mark.parametrize("output", [1, 2], ids=["task losses", "logits"])
def test_the_raw_op_refuses_gradients_of_its_other_outputs(output: int) -> None:
    outputs = raw_outputs(mlp(), make_tasks((6,)))
    with pytest.raises(RuntimeError, match="the meta-loss, alone"):
        outputs[output].sum().backward()


@pytest.mark.parametrize("through", ["parameters", "α", "the raw op"])
def test_a_gradient_penalty_raises(through: str) -> None:
    model, tasks = mlp(), make_tasks((6,))
    alpha = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    loss = raw_outputs(model, tasks)[0] if through == "the raw op" else loss_of(model, tasks, inner_lr=alpha)
    inputs = [alpha] if through == "α" else list(model.parameters())
    gradients = torch.autograd.grad(loss, inputs, create_graph=True)
    assert all(gradient.requires_grad for gradient in gradients)
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        sum(gradient.square().sum() for gradient in gradients).backward()


def test_parameters_written_between_forward_and_backward_are_noticed() -> None:
    model, tasks = mlp(), make_tasks((6,))
    loss = loss_of(model, tasks)
    with torch.no_grad():
        next(model.parameters()).add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_under_no_grad_there_is_no_gradient() -> None:
    model, tasks = mlp(), make_tasks((6,))
    expected = loss_of(model, tasks, support_weight=0.5)
    with torch.no_grad():
        loss = loss_of(model, tasks, support_weight=0.5)
    assert not loss.requires_grad
    assert_close(loss, expected.detach(), "loss")
    model.requires_grad_(False)
    assert not loss_of(model, tasks, adapt=["0", "2"]).requires_grad


def test_frozen_parameters_get_no_gradient() -> None:
    model, tasks = mlp(), make_tasks((6,))
    model[0].requires_grad_(False)
    loss_of(model, tasks, adapt=["0", "2"]).backward()
    assert model[0].weight.grad is None
    frozen = model[2].weight.grad.clone()
    model.zero_grad()
    loss_of(model, tasks, adapt=["0", "2"], engine="torch").backward()
    assert_close(frozen, model[2].weight.grad, "head")


def test_an_encoder_in_front_takes_the_torch_engine() -> None:
    model, tasks, encoder = mlp(), make_tasks((4,)), make(lambda: nn.Linear(4, 6))

    def encoded() -> TaskBatch:
        return TaskBatch(encoder(tasks.support_x), tasks.support_y, encoder(tasks.query_x), tasks.query_y)

    with pytest.raises(ValueError, match="engine is 'native', but tasks require grad"):
        loss_of(model, encoded())
    loss_of(model, encoded(), engine="auto").backward()
    actual = [encoder.weight.grad.clone(), *gradients_of(model)]
    encoder.zero_grad()
    loss_of(model, encoded(), engine="torch").backward()
    for a, e in zip(actual, [encoder.weight.grad, *gradients_of(model)], strict=True):
        assert_close(a, e, "encoder and model")
    with torch.no_grad():
        loss_of(model, encoded())  # nothing is asked of the encoder


@pytest.mark.parametrize("bn", ["transductive", "support", "running"])
def test_nothing_of_the_model_is_written(bn: Any) -> None:
    model = make(lambda: nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 3))).train()
    before = copy.deepcopy(model.state_dict())
    loss_of(model, make_tasks((6,)), bn=bn).backward()
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_torch_func_transforms_take_the_torch_engine() -> None:
    model, tasks = mlp(), make_tasks((6,))
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(parameters: dict[str, Tensor], chosen: Any) -> Tensor:
        inner = InnerLoop.create(model, inner_lr=0.1)
        return engine.meta_result(model, tasks, inner, parameters, engine=chosen).loss

    with pytest.raises(ValueError, match=r"torch\.func"):
        torch.func.grad(loss)(parameters, "native")
    actual, expected = (torch.func.grad(loss)(parameters, chosen) for chosen in ("auto", "torch"))
    for name in parameters:
        assert_close(actual[name], expected[name], name)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # torch's own forward mode
@pytest.mark.parametrize("mode", ["grad", "vmap", "forward mode", "forward mode without grad"])
def test_the_loop_over_tasks_refuses_transforms(mode: str) -> None:
    """autograd.grad, which makes its inner steps, is no part of torch.func's, and drops forward mode's derivatives."""
    model, tasks = make(lambda: nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 3))), make_tasks((6,))
    own = {name: p.detach() for name, p in model.named_parameters()}
    weight = own["0.weight"]

    def loss(weight: Tensor) -> Tensor:
        inner = InnerLoop.create(model, inner_lr=0.1)
        return engine.meta_result(model, tasks, inner, own | {"0.weight": weight}).loss

    def dual(weight: Tensor) -> Tensor:
        with forward_ad.dual_level(), torch.set_grad_enabled(mode == "forward mode"):
            return loss(forward_ad.make_dual(weight, weight))

    call = {"grad": torch.func.grad(loss), "vmap": torch.func.vmap(lambda scale: loss(scale * weight))}.get(mode, dual)
    with pytest.raises(
        ValueError, match=r"torch\.func transform or forward-mode .* a loop over tasks, has derivatives by"
    ):
        call(torch.ones(1) if mode == "vmap" else weight)


def test_autocast_takes_the_torch_engine() -> None:
    with torch.autocast("cpu"), pytest.raises(ValueError, match="autocast"):
        loss_of(mlp(), make_tasks((6,)))


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "a layer": ({"model": nn.Sequential(nn.Linear(6, 4), nn.Softplus(), nn.Linear(4, 3))}, "layer '1' does not lower"),
    "a function as loss": ({"loss": F.cross_entropy}, "loss is a function"),
    "a weighted loss": ({"loss": nn.CrossEntropyLoss(weight=torch.ones(3))}, "loss is a function"),
    "a summed loss": ({"loss": nn.CrossEntropyLoss(reduction="sum")}, "loss is a function"),
    "samples": ({"model": nn.Sequential(nn.Linear(5, 3))}, r"0 meets samples of shape \[6\], expected \[5\]"),
    "ways": ({"model": nn.Sequential(nn.Linear(6, 4))}, "tasks has 3 ways, but the model's head has 4 outputs"),
    "half precision": ({"model": nn.Linear(6, 3).half(), "dtype": torch.float16}, "dtype torch.float16"),
    "mixed dtypes": ({"model": nn.Linear(6, 3)}, "a parameter is torch.float32"),
    "no statistics": (
        {"model": nn.Sequential(nn.BatchNorm1d(6, track_running_stats=False), nn.Linear(6, 3)), "bn": "running"},
        "track_running_stats=False",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_native_says_why_it_cannot(name: str) -> None:
    change, message = REFUSED[name]
    arguments = {"model": mlp(), **change}
    dtype = arguments.pop("dtype", torch.float64)
    model = arguments.pop("model")
    if name not in ("half precision", "mixed dtypes"):
        model = model.double()
    with pytest.raises(ValueError, match=f"engine is 'native', but .*{message}"):
        loss_of(model, make_tasks((6,)).to(dtype), **arguments)


def test_auto_says_once_why_it_is_not_native(caplog: pytest.LogCaptureFixture) -> None:
    model = make(lambda: nn.Sequential(nn.Linear(6, 4), nn.Softplus(), nn.Linear(4, 3)))
    with caplog.at_level(logging.INFO, "innerloop"):
        for mode in (True, True, False, True):  # as fit() with its validations
            loss_of(model.train(mode), make_tasks((6,)), engine="auto")
    assert len(caplog.records) == 1
    assert "layer '1' does not lower: Softplus" in caplog.text
    with pytest.raises(ValueError, match="layer '1' does not lower"):
        innerloop.get("maml")(model, engine="native")


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_loss_modules_are_recognised(smoothing: float) -> None:
    model, tasks = mlp(), make_tasks((6,))
    module = nn.CrossEntropyLoss(label_smoothing=smoothing)
    native_loss = loss_of(model, tasks, loss=module)
    assert_close(native_loss, loss_of(model, tasks, loss=module, engine="torch"), "loss")
    if smoothing:
        module.label_smoothing = 0.0  # noticed, though the arguments are the same objects
        assert_close(loss_of(model, tasks, loss=module), loss_of(model, tasks), "changed")
    targets = make_tasks((6,), out=3)
    assert_close(loss_of(model, targets, loss=nn.MSELoss()), loss_of(model, targets, loss="mse", engine="torch"), "mse")


@pytest.mark.parametrize("module", [nn.CrossEntropyLoss, nn.MSELoss])
def test_a_loss_module_with_a_forward_of_its_own_takes_the_torch_engine(module: type[nn.Module]) -> None:
    model, tasks, doubled = mlp(), make_tasks((6,), out=3 if module is nn.MSELoss else None), module()
    doubled.forward = lambda outputs, targets: 2 * module()(outputs, targets)
    with pytest.raises(ValueError, match="loss is a function"):
        loss_of(model, tasks, loss=doubled)
    actual = loss_of(model, tasks, inner_steps=0, loss=doubled, engine="auto")
    assert_close(actual, 2 * loss_of(model, tasks, inner_steps=0, loss=module()), "loss")


def one_value(side: str, how: str) -> TaskBatch:
    """Three tasks, in the second of which a set has one valid sample."""
    tasks = make_tasks((6,))
    count = {"support": 6, "query": 5}[side]
    mask = torch.ones(3, count, dtype=torch.bool)
    mask[1, 1:] = False
    if how == "a mask":
        return replace(tasks, **{f"{side}_mask": mask})
    x, y = getattr(tasks, f"{side}_x"), getattr(tasks, f"{side}_y")
    return replace(tasks, **{f"{side}_x": x[:, :1], f"{side}_y": y[:, :1]})


@pytest.mark.parametrize("chosen", ["native", "torch"])
@pytest.mark.parametrize("how", ["a mask", "one sample"])
@pytest.mark.parametrize(
    ("side", "bn", "steps", "is_refused"),
    [
        ("support", "transductive", 1, True),
        ("support", "transductive", 0, False),  # the support set is not passed through
        ("support", "support", 1, True),
        ("support", "support", 0, True),
        ("support", "running", 1, False),
        ("query", "transductive", 0, True),
        ("query", "support", 1, False),
        ("query", "running", 1, False),
    ],
)
def test_batch_norm_takes_no_statistics_of_one_value(
    side: str, bn: Any, steps: int, is_refused: bool, how: str, chosen: Any
) -> None:
    model = make(lambda: nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3)))
    tasks = one_value(side, how)
    if not is_refused:
        assert_close(*(loss_of(model, tasks, inner_steps=steps, bn=bn, engine=e) for e in ("native", "torch")), "loss")
        return
    message = rf"{side}_x gives a BatchNorm layer one value.*in task {int(how == 'a mask')}"
    with pytest.raises((RuntimeError, ValueError), match=message if chosen == "native" else "more than 1 value"):
        loss_of(model, tasks, inner_steps=steps, bn=bn, engine=chosen)


def test_inner_loops_and_hessians_take_no_statistics_of_one_value_either() -> None:
    model = make(lambda: nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)))
    tasks = one_value("support", "a mask")
    with pytest.raises(RuntimeError, match="support_x gives a BatchNorm layer one value"):
        innerloop.primitives.adapt(model, tasks, inner_lr=0.1, engine="native")
    with pytest.raises(RuntimeError, match="support_x gives a BatchNorm layer one value"):
        innerloop.primitives.hessian_vector_product(model, tasks, dict(model.named_parameters()), engine="native")


def test_what_is_kept_of_the_arguments_is_never_stale() -> None:
    model, tasks = mlp(), make_tasks((6,))

    def check(**options: Any) -> None:
        for chosen in ("native", "torch"):
            loss_of(model, tasks, engine=chosen, **options).backward()
        gradients = gradients_of(model)
        model.zero_grad()
        loss_of(model, tasks, engine="torch", **options).backward()
        for a, e in zip(gradients, gradients_of(model), strict=True):
            assert_close(a, 2 * e, str(options))

    check()
    check(inner_lr=0.2)
    check(adapt="2")
    check(step_weights=[1.0, 0.5, 0.25])
    check(step_weights=(1.0, 0.5, 0.25))
    model[0].bias.requires_grad_(False)  # and so no longer adapted
    check()
    model[0].bias.requires_grad_(True)
    check()
    model.float()
    tasks = tasks.to(torch.float32)
    loss_of(model, tasks).backward()
    model.double()
    tasks = tasks.to(torch.float64)
    model.zero_grad()
    model[1] = nn.Sigmoid()
    check()
    model[2].weight.data, model[2].bias.data = torch.randn(4, 8).double(), torch.zeros(4).double()
    with pytest.raises(ValueError, match="3 ways, but the model's head has 4 outputs"):
        loss_of(model, tasks)


def test_what_is_kept_of_the_checks_is_never_stale() -> None:
    model, tasks = mlp(), make_tasks((6,))
    query_x = tasks.query_x.clone().requires_grad_()
    loss_of(model, tasks)  # found to be possible, and kept
    with torch.autocast("cpu"), pytest.raises(ValueError, match="autocast"):
        loss_of(model, tasks)
    with pytest.raises(ValueError, match="tasks require grad"):
        loss_of(model, TaskBatch(tasks.support_x, tasks.support_y, query_x, tasks.query_y))
    fewer_ways = TaskBatch(tasks.support_x, tasks.support_y % 2, tasks.query_x, tasks.query_y % 2)
    for other, message in (
        (make_tasks((5,)), r"expected \[6\]"),
        (make_tasks((6,), out=3), "targets have dtype"),
        (tasks.to(torch.float32), "a parameter is torch.float64"),
        (fewer_ways, "2 ways"),
    ):
        with pytest.raises(ValueError, match=message):
            loss_of(model, other)
    loss_of(model, tasks)


# --- threads, compile, adapt ----------------------------------------------------------------------


def test_the_same_bits_for_any_number_of_threads() -> None:
    model = make(lambda: nn.Sequential(nn.Linear(6, 33), nn.Tanh(), nn.Linear(33, 3))).float()
    tasks = make_tasks((6,), tasks=7).to(torch.float32)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            loss_of(model, tasks).backward()
            results.append(gradients_of(model))
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


def test_several_python_threads_at_once() -> None:
    models = [mlp() for _ in range(8)]
    tasks = make_tasks((6,))
    expected = loss_of(mlp(), tasks, engine="torch").detach()
    failures: list[BaseException] = []

    def work(model: nn.Module) -> None:
        try:
            for _ in range(20):
                loss = loss_of(model, tasks)
                loss.backward()
                assert_close(loss.detach(), expected, "loss")
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(model,)) for model in models]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    first = gradients_of(models[0])
    for model in models[1:]:
        assert all(torch.equal(a, b) for a, b in zip(gradients_of(model), first, strict=True))


class Enough(Exception):
    """What the signal handler below raises."""


@pytest.mark.parametrize("call", ["loss", "adapt"])
def test_signal_handlers_run_between_the_tasks_of_a_call(call: str) -> None:
    """The third signal's handler raises: where handlers ran after the call alone, it would see one signal."""
    model, tasks = mlp(), make_tasks((6,), tasks=20_000)  # far longer than three signals take
    calls = {
        "loss": lambda: loss_of(model, tasks, inner_steps=300),
        "adapt": lambda: innerloop.primitives.adapt(model, tasks, inner_lr=0.01, inner_steps=300),
    }
    received = 0

    def handler(number: int, frame: object) -> None:
        nonlocal received
        received += 1
        if received == 3:
            raise Enough

    previous = signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, 0.05, 0.05)
    try:
        with pytest.raises(Enough) as raised:
            calls[call]()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
    assert raised.value.__context__ is None
    assert_close(
        loss_of(model, tasks).detach(), loss_of(model, tasks, engine="torch").detach(), "loss of the next call"
    )


class TaskList(torch.utils.data.Dataset[TaskBatch]):
    """Gives the meta-loss of a batch, computed where the worker is."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> Tensor:
        with torch.no_grad():
            return loss_of(self.model, make_tasks((6,), seed=index))


def test_data_loader_workers() -> None:
    dataset = TaskList(mlp())
    dataset[0]  # the parent has used the engine before it forks
    loader = torch.utils.data.DataLoader(dataset, batch_size=None, num_workers=2)
    for index, loss in enumerate(loader):
        assert_close(loss, dataset[index], "loss of a worker")


def test_adapt_is_the_inner_loop() -> None:
    model = make(lambda: nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3)))
    tasks = make_tasks((6,), tasks=1)
    x, y, query = tasks.support_x[0], tasks.support_y[0], tasks.query_x[0]
    for options in ({}, {"bn": "support"}, {"bn": "running"}, {"inner_steps": 0}):
        learners = [
            innerloop.get("maml")(model, **{"inner_lr": 0.1, "inner_steps": 3, **options}, engine=chosen).adapt(x, y)
            for chosen in ("native", "torch")
        ]
        for (name, a), (_, e) in zip(*(learner.named_parameters() for learner in learners), strict=True):
            assert_close(a, e, name)
        assert_close(learners[0](query), learners[1](query), "outputs")
    assert all(p.grad is None for p in model.parameters())


def test_adapt_to_fewer_ways_than_the_head_has() -> None:
    model, tasks = mlp(), make_tasks((6,), tasks=1)
    x, y = tasks.support_x[0], tasks.support_y[0].clamp(max=1)
    native_learner, torch_learner = (innerloop.get("maml")(model, engine=e).adapt(x, y) for e in ("native", "torch"))
    assert_close(native_learner(x), torch_learner(x), "outputs")
    with pytest.raises(ValueError, match="4 ways"):
        innerloop.get("maml")(model, engine="native").adapt(x, y + 2)


def test_inference_mode_leaves_nothing_behind() -> None:
    model, tasks = mlp(), make_tasks((6,))
    with torch.inference_mode():
        loss = loss_of(model, tasks)
    for chosen in ("native", "torch"):
        later = loss_of(model, tasks, engine=chosen)
        later.backward()
        assert_close(later.detach(), loss, chosen)


def test_an_algorithm_survives_copying_and_pickling() -> None:
    algorithm, tasks = innerloop.get("maml")(mlp(), engine="native"), make_tasks((6,))
    expected = algorithm(tasks).loss
    for twin in (copy.deepcopy(algorithm), pickle.loads(pickle.dumps(algorithm))):
        assert_close(twin(tasks).loss, expected, "loss")


@pytest.fixture
def fresh_compiler() -> Any:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("learned", [False, True], ids=["α a number", "α learned"])
def test_compiles_at_the_first_call_and_once(learned: bool, fresh_compiler: None) -> None:
    tasks = make_tasks((6,))
    rate = nn.Parameter(torch.tensor(0.1, dtype=torch.float64)) if learned else 0.1
    algorithm = innerloop.get("maml")(mlp(), inner_lr=rate, inner_steps=2, engine="native")
    compiled = torch.compile(lambda tasks: algorithm(tasks).loss, fullgraph=True, backend="aot_eager")
    for step in range(3):
        with torch._dynamo.config.patch(error_on_recompile=step > 0):
            if learned:
                with torch.no_grad():
                    rate.fill_(0.1 * (step + 1))
            else:
                algorithm.inner_lr = 0.1 * (step + 1)
            loss = compiled(tasks)
            loss.backward()
        actual = [p.grad.clone() for p in algorithm.parameters()]
        algorithm.zero_grad()
        expected = loss_of(algorithm.model, tasks, inner_lr=rate if learned else 0.1 * (step + 1), engine="torch")
        expected.backward()
        assert_close(loss.detach(), expected.detach(), "loss")
        for a, p in zip(actual, algorithm.parameters(), strict=True):
            assert_close(a, p.grad, "gradient")
        algorithm.zero_grad()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # dynamo's own, after a graph break
def test_a_compiled_step_notices_another_mode(fresh_compiler: None) -> None:
    model = make(lambda: nn.Sequential(nn.Linear(6, 3), nn.Dropout(0.5))).eval()
    algorithm = innerloop.get("maml")(model, inner_lr=0.1)
    compiled = torch.compile(lambda tasks: algorithm(tasks).loss, backend="aot_eager")
    tasks = make_tasks((6,))
    assert_close(compiled(tasks).detach(), algorithm(tasks).loss.detach(), "eval")
    with torch.no_grad():
        model[0].weight.mul_(3)
    assert_close(compiled(tasks).detach(), algorithm(tasks).loss.detach(), "other values")
    model.train()
    losses = {float(compiled(tasks).detach()) for _ in range(5)}
    assert len(losses) == 5, "dropout draws anew"


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # dynamo's own, after a graph break
def test_a_compiled_step_notices_other_attributes_and_hooks(fresh_compiler: None) -> None:
    model = make(lambda: nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.LeakyReLU(0.1), nn.Linear(5, 3)))
    algorithm = innerloop.get("maml")(model, inner_lr=0.1)
    compiled = torch.compile(lambda tasks: algorithm(tasks).loss, backend="aot_eager")
    tasks = make_tasks((6,))
    for eps, slope in ((1e-5, 0.1), (0.3, 0.1), (0.5, 0.1), (0.5, 0.7)):
        model[1].eps, model[2].negative_slope = eps, slope
        expected = loss_of(model, tasks, inner_steps=1, engine="torch").detach()
        assert_close(compiled(tasks).detach(), expected, f"eps {eps}, slope {slope}")
    model[2].register_forward_hook(lambda module, inputs, output: 2 * output)
    expected = loss_of(model, tasks, inner_steps=1, engine="torch").detach()
    assert_close(compiled(tasks).detach(), expected, "a hook")


@pytest.mark.parametrize("argument", ["inner_lr", "support_weight", "step_weights"])
def test_numbers_may_be_arguments_of_a_compiled_step(argument: str, fresh_compiler: None) -> None:
    model, tasks = mlp(), make_tasks((6,))

    def step(number: float, chosen: Any) -> Tensor:
        value = [number, 0.0, 1.0] if argument == "step_weights" else number
        return loss_of(model, tasks, engine=chosen, **{argument: value})

    compiled = torch.compile(lambda number: step(number, "native"), fullgraph=True, backend="aot_eager")
    for number in (0.1, 0.2, 0.3):
        assert_close(compiled(number).detach(), step(number, "torch").detach(), f"{argument} {number}")


@pytest.mark.parametrize("chosen", ["native", "torch"])
def test_a_model_compiled_in_place_runs_as_it_is(chosen: Any, fresh_compiler: None) -> None:
    model, tasks = mlp(), make_tasks((6,))
    expected = loss_of(model, tasks, engine="torch").detach()
    model.compile(backend="eager")
    model[0].compile(backend="eager")
    assert_close(loss_of(model, tasks, engine=chosen).detach(), expected, "loss")
