"""Which models lower, to what Program, and what is said about those that do not."""

from __future__ import annotations

import copy
import gc
import pickle
import random
import struct
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from innerloop import _native, models
from innerloop.lowering import NotLowerable, lower, lowered
from innerloop.program import Kind, Node, Program
from nets import function_of
from resnet12 import ResNet12


def run(program: Program, model: nn.Module, x: Tensor) -> Tensor:
    """The Program in plain torch, BatchNorm by the statistics of the batch."""
    tensors = dict(model.named_parameters())
    values = [x]
    for node in program.nodes:
        names = [program.parameters[place] if place >= 0 else None for place in node.parameters]
        parameters = [None if name is None else tensors[name] for name in names]
        values.append(_compute(node, [values[i] for i in node.inputs], parameters))
    return values[program.output]


def _compute(node: Node, inputs: list[Tensor], p: list[Any]) -> Tensor:
    x, a, kind = inputs[0], node.attributes, node.kind
    if kind is Kind.LINEAR:
        return F.linear(x, *p)
    if kind is Kind.CONV2D:
        return F.conv2d(x, *p, stride=a[:2], padding=a[2:])
    if kind is Kind.BATCH_NORM:
        return F.batch_norm(x, None, None, *p, training=True, eps=a[0])
    if kind is Kind.LAYER_NORM:
        return F.layer_norm(x, x.shape[1:], *p, eps=a[0])
    if kind is Kind.GROUP_NORM:
        return F.group_norm(x, a[1], *p, eps=a[0])
    if kind is Kind.LEAKY_RELU:
        return F.leaky_relu(x, a[0])
    if kind is Kind.GELU:
        return F.gelu(x, approximate=("none", "tanh")[a[0]])
    if kind is Kind.MAX_POOL:
        return F.max_pool2d(x, a[:2], a[2:4], a[4:])
    if kind is Kind.AVG_POOL:
        return F.avg_pool2d(x, a[:2], a[2:4], a[4:6], count_include_pad=bool(a[6]))
    if kind is Kind.GLOBAL_AVG_POOL:
        return x.mean((2, 3), keepdim=True)
    if kind is Kind.FLATTEN:
        return x.flatten(1)
    if kind is Kind.ADD:
        return x + inputs[1]
    return {Kind.RELU: torch.relu, Kind.TANH: torch.tanh, Kind.SIGMOID: torch.sigmoid}[kind](x)


class Residual(nn.Module):
    def __init__(self, in_place: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 2, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(2)
        self.act = nn.ReLU(inplace=in_place)
        self.in_place = in_place

    def forward(self, x: Tensor) -> Tensor:
        out = self.norm(self.conv(x))
        if self.in_place:
            out += x
        else:
            out = out + x
        return self.act(out)


class Renamed(nn.Linear):
    """A subclass that computes what its base class does."""

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight)
        nn.init.zeros_(self.bias)


class Body(nn.Module):
    """forward with arguments that have defaults, a list of layers, and a shared activation."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])
        self.act = nn.Tanh()

    def forward(self, x: Tensor, scale: Tensor | None = None, *, extra: bool = False) -> Tensor:
        if scale is not None or extra:
            raise AssertionError("the defaults were not taken")
        for layer in self.layers:
            x = self.act(layer(x))
        return x


class Counting(nn.Module):
    """As MetaOptNet's blocks do: a counter for a DropBlock that is off."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0
        self.linear = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.linear(x)


def seq(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(*layers)


def on_images(function: Callable[[Tensor], Tensor]) -> nn.Module:
    """Samples [2, 8, 8] through a function."""
    return function_of(nn.Conv2d(2, 2, 3, padding=1), function)


def text(*lines: str) -> str:
    return "\n".join(lines)


IMAGE, VECTOR = (2, 8, 8), (8,)

# (model, sample shape, the Program without the comments)
LOWERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], str | None]] = {
    "the mission's SimpleModel": (
        lambda: models.SimpleModel(inputs=128),
        IMAGE,
        text(
            "v1 = flatten(x)",
            "v2 = linear(v1, fc1.weight, fc1.bias)",
            "v3 = relu(v2)",
            "v4 = linear(v3, fc2.weight, fc2.bias)",
            "return v4",
        ),
    ),
    "conv4": (
        lambda: models.conv4((1, 16, 16), 5, filters=3),
        (1, 16, 16),
        text(
            *(
                line
                for block, (read, value) in enumerate([("x", 1), ("v4", 5), ("v8", 9), ("v12", 13)])
                for line in (
                    f"v{value} = conv2d({read}, {4 * block}.weight, {4 * block}.bias, stride=1x1, padding=1x1)",
                    f"v{value + 1} = batch_norm(v{value}, {4 * block + 1}.weight, {4 * block + 1}.bias, "
                    f"{4 * block + 1}.running_mean, {4 * block + 1}.running_var, eps=1e-05)",
                    f"v{value + 2} = relu(v{value + 1})",
                    f"v{value + 3} = max_pool(v{value + 2}, kernel=2x2, stride=2x2, padding=0x0)",
                )
            ),
            "v17 = flatten(v16)",
            "v18 = linear(v17, 17.weight, 17.bias)",
            "return v18",
        ),
    ),
    "a residual block": (
        lambda: seq(Residual(False), nn.Flatten()),
        IMAGE,
        text(
            "v1 = conv2d(x, 0.conv.weight, stride=1x1, padding=1x1)",
            "v2 = batch_norm(v1, 0.norm.weight, 0.norm.bias, 0.norm.running_mean, 0.norm.running_var, eps=1e-05)",
            "v3 = add(v2, x)",
            "v4 = relu(v3)",
            "v5 = flatten(v4)",
            "return v5",
        ),
    ),
    "a residual block in place": (lambda: seq(Residual(True), nn.Flatten()), IMAGE, None),
    "ResNet-12": (lambda: ResNet12(channels=(2, 3, 4, 5), outputs=3), (3, 16, 16), None),
    "every module": (
        lambda: seq(
            nn.Conv2d(2, 4, (3, 1), stride=(2, 1), padding=(1, 0)),
            nn.BatchNorm2d(4, affine=False, track_running_stats=False, eps=1e-3),
            nn.LeakyReLU(0.2),
            nn.MaxPool2d(2, stride=1, padding=1),
            nn.GroupNorm(2, 4),
            nn.GELU(approximate="tanh"),
            nn.Identity(),
            nn.Dropout2d(0.0),
            nn.Conv2d(4, 4, 3, padding="same"),
            nn.AvgPool2d(2, padding=1, count_include_pad=False),
            nn.Tanh(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.LayerNorm(4, elementwise_affine=False),
            nn.Linear(4, 4, bias=False),
            nn.BatchNorm1d(4),
            nn.Sigmoid(),
        ),
        IMAGE,
        text(
            "v1 = conv2d(x, 0.weight, 0.bias, stride=2x1, padding=1x0)",
            "v2 = batch_norm(v1, eps=0.001)",
            "v3 = leaky_relu(v2, slope=0.2)",
            "v4 = max_pool(v3, kernel=2x2, stride=1x1, padding=1x1)",
            "v5 = group_norm(v4, 4.weight, 4.bias, groups=2, eps=1e-05)",
            "v6 = gelu(v5, tanh=1)",
            "v7 = conv2d(v6, 8.weight, 8.bias, stride=1x1, padding=1x1)",
            "v8 = avg_pool(v7, kernel=2x2, stride=2x2, padding=1x1, count_include_pad=0)",
            "v9 = tanh(v8)",
            "v10 = global_avg_pool(v9)",
            "v11 = flatten(v10)",
            "v12 = layer_norm(v11, eps=1e-05)",
            "v13 = linear(v12, 14.weight)",
            "v14 = batch_norm(v13, 15.weight, 15.bias, 15.running_mean, 15.running_var, eps=1e-05)",
            "v15 = sigmoid(v14)",
            "return v15",
        ),
    ),
    "defaults of forward, a ModuleList, one activation for two layers": (Body, VECTOR, None),
    "a counter that changes nothing": (Counting, VECTOR, None),
    "a subclass without code of its own": (lambda: Renamed(8, 3), VECTOR, None),
    "dropout in eval mode": (lambda: seq(nn.Linear(8, 3), nn.Dropout(0.5)).eval(), VECTOR, None),
    "one layer": (lambda: nn.Linear(8, 3), VECTOR, "v1 = linear(x, weight, bias)\nreturn v1"),
    "layer norm over images": (lambda: seq(nn.LayerNorm([2, 8, 8]), nn.Flatten()), IMAGE, None),
    "a sum of a value with itself": (lambda: function_of(nn.Linear(8, 3), lambda x: x + x), VECTOR, None),
    "what the output does not need": (
        lambda: function_of(nn.Linear(8, 3), lambda x: (torch.tanh(x), x.relu())[1]),
        VECTOR,
        "v1 = linear(x, layer.weight, layer.bias)\nv2 = relu(v1)\nreturn v2",
    ),
    **{
        f"x.{name}": (lambda f=function: on_images(f), IMAGE, None)
        for name, function in {
            "view(x.size(0), -1)": lambda x: x.view(x.size(0), -1),
            "view(x.size()[0], -1)": lambda x: x.view(x.size()[0], -1),
            "view(x.shape[0], -1)": lambda x: x.view(x.shape[0], -1),
            "view(b, -1), b unpacked": lambda x: _unpacked(x),
            "view((-1, 128))": lambda x: x.view((-1, 128)),
            "view(-1, 2, 8, 8)": lambda x: x.view(-1, 2, 8, 8).flatten(1),
            "reshape(len, 128)": lambda x: x.reshape(x.size(0), 128),
            "contiguous": lambda x: x.contiguous().view(x.size(dim=0), -1),
            "torch.reshape": lambda x: torch.reshape(x, (-1, 128)),
            "torch.flatten": lambda x: torch.flatten(x, start_dim=1),
            "flatten(1, -1)": lambda x: x.flatten(1, -1),
            "mean((2, 3))": lambda x: x.mean((2, 3)),
            "mean([-1, -2], keepdim)": lambda x: x.mean([-1, -2], keepdim=True).flatten(1),
            "torch.mean": lambda x: torch.mean(x, dim=(2, 3)),
            "F.max_pool2d": lambda x: F.max_pool2d(x, 2).flatten(1),
            "F.max_pool2d stride": lambda x: F.max_pool2d(x, (3, 2), stride=(1, 2), padding=1).flatten(1),
            "torch.max_pool2d": lambda x: torch.max_pool2d(x, 2).flatten(1),
            "F.avg_pool2d": lambda x: F.avg_pool2d(x, 3, padding=1, count_include_pad=False).flatten(1),
            "F.adaptive_avg_pool2d": lambda x: F.adaptive_avg_pool2d(x, (1, 1)).flatten(1),
            "activations": lambda x: F.gelu(F.leaky_relu(torch.sigmoid(torch.tanh(F.relu(x))))).flatten(1),
            "activation methods": lambda x: x.relu().tanh().sigmoid().flatten(1),
            "gelu tanh": lambda x: F.gelu(x, approximate="tanh").flatten(1),
            "in place": lambda x: F.relu(torch.tanh(x), inplace=True).relu_().flatten(1),
            "adds": lambda x: torch.add(x, x.tanh()).add(x).flatten(1),
            "dropout": lambda x: F.dropout(F.dropout(x, 0.5, training=False), p=0.0).flatten(1),
        }.items()
    },
}


def _unpacked(x: Tensor) -> Tensor:
    batch, _, _, _ = x.shape
    return x.view(batch, -1)


@pytest.mark.parametrize("name", LOWERS)
def test_a_program_computes_what_the_model_does(name: str) -> None:
    build, shape, expected = LOWERS[name]
    torch.manual_seed(0)
    model = build().double()
    program = lower(model)
    if expected is not None:
        lines = [line.partition("#")[0].split() for line in str(program).splitlines()]
        assert "\n".join(" ".join(line) for line in lines) == expected
    for batch in (2, 5):
        x = torch.randn(batch, *shape, dtype=torch.float64)
        torch.testing.assert_close(run(program, model, x), model(x.clone()), rtol=1e-12, atol=1e-12)
    assert [tuple(v.shape[1:]) for v in [run(program, model, x)]] == [program.shapes(shape)[program.output]]


def test_lowering_leaves_no_mark_on_the_model() -> None:
    model = Counting()
    before = copy.deepcopy(vars(model))
    numbers = torch.get_rng_state(), random.getstate()
    lower(model)
    assert model.calls == before["calls"] == 0
    assert set(vars(model)) == set(before)
    assert torch.equal(torch.get_rng_state(), numbers[0])
    assert random.getstate() == numbers[1]


def test_a_model_made_in_inference_mode_lowers() -> None:
    with torch.inference_mode():
        model = seq(nn.Linear(8, 3), nn.BatchNorm1d(3))
        assert isinstance(lower(model), Program)
    assert isinstance(lower(model), Program)


# --- what is refused ------------------------------------------------------------------------------


class OwnForward(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 2


class OwnConvolution(nn.Conv2d):
    """Weight standardisation in a method that Conv2d.forward calls."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(input, weight - weight.mean(), bias)


class Stateful(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 3)
        self.register_buffer("seen", torch.zeros(()))
        self.calls = 0
        self.features: Any = None
        self.history: list[Any] = []
        self.scale = nn.Parameter(torch.ones(3))
        self.kind = kind

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "buffer":
            self.seen.add_(1)
        elif self.kind == "assigned buffer":
            self.seen = self.seen + 1
        elif self.kind == "calls":
            self.calls += 1
            return self.linear(x) if self.calls < 100 else torch.relu(self.linear(x))
        elif self.kind == "features":
            self.features = x
        elif self.kind == "history":
            self.history.append(x)
        elif self.kind == "scale":
            return self.linear(x) * self.scale
        elif self.kind == "no_grad":
            with torch.no_grad():
                x = torch.relu(x)
        elif self.kind == "autocast":
            with torch.autocast("cpu"):
                x = torch.relu(x)
        elif self.kind == "random":
            return self.linear(x) if random.random() < 2 else x
        elif self.kind == "torch random":
            return self.linear(x) if torch.rand(()) < 2 else x
        elif self.kind == "new parameter":
            return F.linear(x, torch.zeros(3, 8))
        elif self.kind == "own function":
            return self.linear(Doubled.apply(x))
        return self.linear(x)


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


def hooked(kind: str) -> nn.Module:
    model = seq(nn.Linear(8, 3))
    {
        "forward": lambda: model[0].register_forward_hook(lambda module, inputs, output: output * 2),
        "pre": lambda: model[0].register_forward_pre_hook(lambda module, inputs: None),
        "backward": lambda: model[0].register_full_backward_hook(lambda module, inputs, outputs: None),
        "whole": lambda: model.register_forward_hook(lambda module, inputs, output: None),
    }[kind]()
    return model


def tied() -> nn.Module:
    model = seq(nn.Linear(8, 8), nn.Linear(8, 8))
    model[1].weight = model[0].weight
    return model


def frozen_weight() -> nn.Module:
    model = nn.Linear(8, 3)
    weight = model.weight.detach()
    del model.weight
    model.register_buffer("weight", weight)
    return model


class Unregistered(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = (nn.Linear(8, 3),)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers[0](x)


def reused() -> nn.Module:
    layer = nn.Linear(8, 8)
    return seq(layer, nn.ReLU(), layer)


def replaced() -> nn.Module:
    model = seq(nn.Linear(8, 3))
    model[0].forward = lambda x: x  # type: ignore[method-assign]
    return model


def written_and_read(x: Tensor) -> Tensor:
    before = x
    x += x.tanh()
    return (x + before).flatten(1)


def written_through_a_view(x: Tensor) -> Tensor:
    flat = x.flatten(1)
    torch.relu_(x)
    return flat


def written_and_dropped(x: Tensor) -> Tensor:
    x.relu_()
    return x.flatten(1)


REFUSES: dict[str, tuple[Callable[[], nn.Module], str, str]] = {
    "groups": (lambda: seq(nn.Conv2d(2, 2, 3, groups=2)), "0", "Conv2d: groups is 2"),
    "dilation": (lambda: seq(nn.Conv2d(2, 2, 3, dilation=2)), "0", "dilation is"),
    "padding mode": (lambda: seq(nn.Conv2d(2, 2, 3, padding=1, padding_mode="reflect")), "0", "pads with zeros"),
    "an even 'same'": (lambda: seq(nn.Conv2d(2, 2, 2, padding="same")), "0", "padding is 'same'"),
    "a transposed convolution": (lambda: seq(nn.ConvTranspose2d(2, 2, 3)), "0", "ConvTranspose2d: the native"),
    "a convolution in one dimension": (lambda: seq(nn.Conv1d(2, 2, 3)), "0", "Conv1d"),
    "ceil_mode": (lambda: seq(nn.MaxPool2d(2, ceil_mode=True)), "0", "ceil_mode is set"),
    "avg ceil_mode": (lambda: seq(nn.AvgPool2d(2, ceil_mode=True)), "0", "ceil_mode is set"),
    "pool dilation": (lambda: seq(nn.MaxPool2d(2, dilation=2)), "0", "dilation is 2"),
    "indices": (lambda: seq(nn.MaxPool2d(2, return_indices=True)), "0", "return_indices"),
    "indices of F.": (lambda: on_images(lambda x: F.max_pool2d(x, 2, return_indices=True)[0]), "", "return_indices"),
    "divisor": (lambda: seq(nn.AvgPool2d(2, divisor_override=3)), "0", "divisor_override"),
    "adaptive 2": (lambda: seq(nn.AdaptiveAvgPool2d(2)), "0", "output_size is 2"),
    "eps 0": (lambda: seq(nn.LayerNorm(8, eps=0.0)), "0", "eps is 0.0"),
    "a weight that is a buffer": (frozen_weight, "", "no parameter of the model"),
    "a layer in a plain list": (Unregistered, "", "does not lower"),
    "instance norm": (lambda: seq(nn.InstanceNorm2d(2)), "0", "InstanceNorm2d"),
    "ReLU6": (lambda: seq(nn.ReLU6()), "0", "ReLU6"),
    "a recurrent net": (lambda: seq(nn.LSTM(8, 3)), "0", "LSTM"),
    "forward hook": (lambda: hooked("forward"), "0", "hooks"),
    "pre hook": (lambda: hooked("pre"), "0", "hooks"),
    "backward hook": (lambda: hooked("backward"), "0", "hooks"),
    "hook on the whole": (lambda: hooked("whole"), "", "hooks"),
    "a subclass": (lambda: seq(OwnForward(8, 3)), "0", "OwnForward: it is a subclass of Linear with code of its own"),
    "a subclass's helper": (lambda: seq(OwnConvolution(2, 2, 3)), "0", "subclass of Conv2d"),
    "a replaced forward": (replaced, "0", "its forward was replaced"),
    "a parametrization": (lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(8, 3)), "", "parametrized"),
    "training dropout": (lambda: seq(nn.Linear(8, 3), nn.Dropout(0.5)), "1", r"drops at random .*Call \.eval\(\)"),
    "functional dropout": (lambda: on_images(lambda x: F.dropout(x)), "", "drops at random"),
    "tied weights": (tied, "1", r"parameter '0.weight': it is used twice \(by 0 before\)"),
    "one layer twice": (reused, "0", "used twice"),
    "control flow": (lambda: on_images(lambda x: x if x.sum() > 0 else -x), "", "depends on the input"),
    "control flow on a shape": (lambda: on_images(lambda x: x if x.shape[0] > 4 else -x), "", "depends on the input"),
    "len": (lambda: on_images(lambda x: x.view(len(x), -1)), "", "cannot trace"),
    "numpy": (lambda: on_images(lambda x: torch.from_numpy(x.numpy())), "", "cannot trace"),
    "isinstance": (lambda: on_images(lambda x: x if isinstance(x, Tensor) else x[0]), "", "asks for the type"),
    "is_tensor": (lambda: on_images(lambda x: x if torch.is_tensor(x) else x[0]), "", "asks for the type"),
    "new tensors of a size": (lambda: on_images(lambda x: torch.zeros(x.size(0), 3)), "", "does not lower"),
    "two outputs": (lambda: function_of(nn.Linear(8, 3), lambda x: (x, x)), "", "not one tensor"),
    "no layers": (nn.Identity, "", "the input itself"),
    "batch in view": (lambda: on_images(lambda x: x.view(25, -1)), "", "fixes the number of samples at 25"),
    "view of all": (lambda: on_images(lambda x: x.view(-1)), "", "reshape is not understood"),
    "computed sizes": (lambda: on_images(lambda x: x.view(x.size(0), x.size(1), -1)), "", "reshape is not understood"),
    "product of sizes": (lambda: on_images(lambda x: x.view(x.size(0), x.size(1) * 64)), "", "mul"),
    "a view as a dtype": (lambda: on_images(lambda x: x.view(torch.int64)), "", "reshape is not understood"),
    "flatten(0)": (lambda: on_images(lambda x: x.flatten()), "", "flattens dimensions 0"),
    "flatten(2)": (lambda: on_images(lambda x: x.flatten(2)), "", "flattens dimensions 2"),
    "mean of one": (lambda: on_images(lambda x: x.mean(3)), "", "mean over both image dimensions"),
    "mean of all": (lambda: on_images(lambda x: x.mean()), "", "mean over both image dimensions"),
    "x + 1": (lambda: on_images(lambda x: x + 1), "", "no layer's output"),
    "alpha": (lambda: on_images(lambda x: torch.add(x, x, alpha=2)), "", "alpha is 2"),
    "x * x": (lambda: on_images(lambda x: x * x), "", r"mul\(x, x\): the native engine has no such layer"),
    "indexing": (lambda: on_images(lambda x: x[:, 0]), "", "indexing"),
    "detach": (lambda: on_images(lambda x: x.detach()), "", "detach"),
    "in place, read later": (lambda: on_images(lambda x: written_and_read(x.tanh())), "", "read again later"),
    "in place through a view": (lambda: on_images(written_through_a_view), "", "read again later"),
    "in place, result dropped": (lambda: on_images(written_and_dropped), "", "read again later"),
    "in place on the input": (lambda: seq(nn.ReLU(inplace=True), nn.Linear(8, 3)), "0", "writes to the input"),
    **{
        kind: (lambda k=kind: Stateful(k), "", words)
        for kind, words in {
            "buffer": "seen: forward uses a parameter, buffer or constant",
            "assigned buffer": "writes a buffer",
            "calls": "depends on self.calls",
            "features": "writes self.features",
            "history": "writes self.history",
            "scale": "scale: forward uses a parameter",
            "no_grad": "turns gradients off",
            "autocast": "autocast",
            "random": "random numbers",
            "torch random": "random numbers",
            "new parameter": "uses a parameter, buffer or constant",
            "own function": "does not lower",
        }.items()
    },
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSES)
def test_what_is_not_understood_is_refused(name: str) -> None:
    build, path, words = REFUSES[name]
    with pytest.raises(NotLowerable, match=words) as caught:
        lower(build())
    assert caught.value.path == path
    assert "\n" not in str(caught.value)


def test_an_error_can_be_copied_and_pickled() -> None:
    error = NotLowerable("a.b", "Conv2d", "groups is 2", "use one")
    for twin in (copy.copy(error), pickle.loads(pickle.dumps(error))):
        assert str(twin) == str(error) == "layer 'a.b' does not lower: Conv2d: groups is 2. Use one."


@pytest.mark.parametrize(
    ("model", "shape", "message"),
    [
        (models.SimpleModel(), (2, 28, 28), r"x.view\(-1, 784\) meets samples of shape \[1568\], expected \[784\]"),
        (seq(nn.Flatten(), nn.Linear(9, 2)), (2, 2, 2), r"1 meets samples of shape \[8\], expected \[9\]"),
        (nn.Linear(8, 3), (4, 8), r"expected a vector \[F\] or an image"),
        (nn.Linear(8, 3), (1, 1, 8), r"meets samples of shape \[1, 1, 8\], expected \[8\]"),
        (seq(nn.Conv2d(2, 2, 3), nn.Flatten()), (3, 8, 8), r"0 meets .* \[3, 8, 8\], expected \[2, H, W\]"),
        (seq(nn.Conv2d(2, 2, 3), nn.Flatten()), (2, 2, 8), r"0 has a window of 3 × 3, which does not fit into"),
        (nn.Conv2d(2, 2, 3), (2, 8, 8), r"outputs have shape \[2, 6, 6\].* expected a vector: flatten them, or take"),
        (seq(nn.MaxPool2d(2, stride=(1, 0)), nn.Flatten()), (2, 8, 8), "0 has a stride of 1 × 0, expected at least 1"),
        (seq(nn.Conv2d(2, 2, 3, stride=0), nn.Flatten()), (2, 8, 8), "0 has a stride of 0 × 0, expected at least 1"),
        (seq(nn.BatchNorm1d(8), nn.Linear(8, 3)), (7,), r"0 meets samples of shape \[7\], expected \[8\]"),
        (seq(nn.BatchNorm2d(8), nn.Flatten()), (8,), r"0 meets samples of shape \[8\], expected \[8, H, W\]"),
        (seq(nn.LayerNorm(8), nn.Flatten()), (2, 4, 8), r"0 meets samples of shape \[2, 4, 8\], expected \[8\]"),
        (seq(nn.GroupNorm(2, 4), nn.Flatten()), (6,), r"0 meets samples of shape \[6\], expected 4 channels"),
        (function_of(nn.Identity(), lambda x: x.mean((-2, -1))), (8,), "expected an image"),
        (function_of(nn.Flatten(), lambda x: x.view(-1, 1, 28, 28)), (784,), r"expected \[1, 28, 28\]"),
    ],
)  # fmt: skip
def test_shapes_are_checked_when_they_are_known(model: nn.Module, shape: tuple[int, ...], message: str) -> None:
    program = lower(model)
    with pytest.raises(ValueError, match=message):
        program.shapes(shape)


# --- the encoding and the counts ------------------------------------------------------------------


def test_the_encoding() -> None:
    (eps,) = struct.unpack("<q", struct.pack("<d", 1e-5))
    model = seq(nn.Conv2d(2, 4, 3, stride=2, bias=False), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 3))
    assert lower(model).encode() == [
        *(1, 4, 5, 2, 4),
        *(1, 1, 0, 2, 0, -1, 4, 2, 2, 0, 0),
        *(2, 1, 1, 2, 1, 2, 3, eps, 0, 1),
        *(13, 1, 2, 0, 0),
        *(0, 1, 3, 2, 3, 4, 0),
    ]


def test_costs_are_those_of_the_products() -> None:
    program = lower(seq(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)))
    first, last = 2 * 3 * 4, 2 * 4 * 2
    # The first layer: forward and the weight's gradient, and the tangents of both. The last: the input's gradient
    # too, and each of the three becomes two products in the Hessian-vector product.
    step = 10 * ((2 + 2) * first + (3 + 6) * last)
    assert program.cost((3,), support=10, query=7, steps=5).flops == 5 * step + 7 * (2 * first + 3 * last)
    assert program.cost((3,), 10, 7, 5, first_order=True).flops == 5 * 10 * (2 * first + 3 * last) + 7 * (
        2 * first + 3 * last
    )


# --- kept for a model -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    {
        "train": lambda m: m.train(),
        "another dropout": lambda m: setattr(m[1], "p", 0.25),
        "a replaced module": lambda m: m.__setitem__(0, nn.Linear(8, 3)),
        "an added module": lambda m: m.append(nn.ReLU()),
        "a replaced parameter": lambda m: setattr(m[0], "weight", nn.Parameter(torch.zeros(3, 8))),
        "a parameter of another shape": lambda m: setattr(m[0].weight, "data", torch.zeros(4, 8)),
        "another dtype": lambda m: m.double() and None,
        "a removed bias": lambda m: setattr(m[0], "bias", None),
        "a hook": lambda m: m[0].register_forward_hook(lambda module, inputs, output: None) and None,
        "a list": lambda m: m[2].extra.append(1),
        "an array": lambda m: setattr(m[2], "table", torch.zeros(3)),
    }.items(),
    ids=lambda item: item[0],
)
def test_a_changed_model_is_lowered_again(change: tuple[str, Callable[[Any], None]]) -> None:
    model: Any = seq(nn.Linear(8, 3), nn.Dropout(0.5), nn.Identity()).eval()
    model[2].extra, model[2].table = [], torch.ones(3)
    kept = lowered(model)
    with torch.no_grad():
        model[0].weight.add_(1)
    model.zero_grad()
    model[1].p = float("0.5")  # another object
    assert lowered(model) is kept, "values of parameters, and equal attributes, are no change"
    change[1](model)
    again = lowered(model)
    assert again is not kept
    assert lowered(model) is again


def test_parameters_may_be_any_tensors() -> None:
    model = nn.Linear(8, 3)
    weight = torch.zeros(3, 8, requires_grad=True) * 2
    vars(model)["_parameters"]["weight"] = weight  # as clones and torch.func.functional_call do
    assert lowered(model).parameters[0] is weight


_KEY, _VALUE = "key", object()


@pytest.mark.parametrize(
    ("change", "held"),
    {
        "nothing": (lambda a, b: None, True),
        "the same again": (lambda a, b: a.update({_KEY: _VALUE}), True),
        "another value": (lambda a, b: a.update({_KEY: object()}), False),
        "one more": (lambda a, b: b.update(more=_VALUE), False),
        "one less": (lambda a, b: b.clear(), False),
        "another name": (lambda a, b: b.update(other=b.pop("last")), False),
        "moved to the next": (lambda a, b: b.update({_KEY: a.pop(_KEY)}), False),
    }.values(),
)
def test_dicts_that_hold_exactly_the_same(change: Callable[[Any, Any], None], held: bool) -> None:
    first, second = {_KEY: _VALUE}, {"last": None}
    contents = (first, _KEY, _VALUE, second, "last", None)
    change(first, second)
    assert _native.hold_exactly([first, second], contents) is held


def test_what_holds_nothing_is_refused() -> None:
    with pytest.raises(TypeError, match="dicts must hold dicts"):
        _native.hold_exactly([[]], ([],))


def test_a_global_hook_stops_lowering() -> None:
    model = nn.Linear(8, 3)
    assert lowered(model).program is not None
    handle = nn.modules.module.register_module_forward_hook(lambda module, inputs, output: None)
    try:
        assert "global module hook" in str(lowered(model).error)
    finally:
        handle.remove()
    assert lowered(model).program is not None


@pytest.mark.parametrize("build", [lambda: nn.Linear(8, 3), lambda: seq(nn.ReLU6())], ids=["lowers", "does not"])
def test_a_model_is_not_kept_alive(build: Callable[[], nn.Module]) -> None:
    model = build()
    lowered(model)
    alive = weakref.ref(model)
    del model
    gc.collect()
    assert alive() is None


def test_other_threads_run_their_models_while_one_is_traced() -> None:
    entered, traced = threading.Event(), threading.Event()
    outputs: list[Any] = []

    def waiting(x: Tensor) -> Tensor:
        entered.set()
        assert traced.wait(10)
        return x

    model, other = function_of(nn.Linear(8, 3), waiting), nn.Linear(8, 3)
    thread = threading.Thread(target=lambda: outputs.append(lower(model)))
    thread.start()
    assert entered.wait(10)
    try:
        outputs.append(other(torch.ones(1, 8)))
        outputs.append(model.layer(torch.ones(1, 8)))
    finally:
        traced.set()
        thread.join()
    assert isinstance(outputs[0], Tensor)
    assert isinstance(outputs[1], Tensor)
    assert isinstance(outputs[2], Program)


def test_random_numbers_of_another_thread_stop_nothing() -> None:
    """Threads share the generators: what was drawn while a model was traced need not be its own."""
    drawn = []

    def others_draw_once(x: Tensor) -> Tensor:
        if not drawn:
            thread = threading.Thread(target=lambda: drawn.append(torch.rand(1)))
            thread.start()
            thread.join()
        return x

    model = function_of(nn.Linear(8, 3), others_draw_once)
    assert isinstance(lower(model), Program)
    assert drawn
