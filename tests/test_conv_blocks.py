"""The specialised paths of convolutional nets, each forced, against the torch engine and against their plain twins."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from innerloop import TaskBatch, engine, native_engine, torch_engine
from innerloop.inner_loop import InnerLoop
from innerloop.ops import maml as native
from nets import assert_close, make, make_tasks, ragged

# lanes, low_rank, conv_block, winograd, patch_moments: 0 off, 2 forced
PLAIN = (0, 0, 0, 0, 0, 0)
PATHS = {
    "winograd alone": (0, 0, 0, 2, 0, 2),
    "block": (0, 0, 2, 0, 0, 0),
    "block, winograd": (0, 0, 2, 2, 0, 2),
    "block, patch moments": (0, 0, 2, 0, 2, 0),
    "all": (0, 0, 2, 2, 2, 2),
}


def block(inputs: int, outputs: int, pool: bool = True, **options: Any) -> list[nn.Module]:
    affine = options.pop("affine", True)
    options = {"kernel_size": 3, "padding": 1, **options}
    layers = [nn.Conv2d(inputs, outputs, **options), nn.BatchNorm2d(outputs, affine=affine), nn.ReLU()]
    return [*layers, nn.MaxPool2d(2)] if pool else layers


def head(features: int) -> list[nn.Module]:
    return [nn.Flatten(), nn.Linear(features, 3)]


class Shared(nn.Module):
    """A block whose output two layers read, and a chain that is no block: its BatchNorm has two readers."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(*block(1, 4, pool=False))
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.head = nn.Sequential(*head(4 * 6 * 6))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        y = self.norm(self.conv(x))
        return self.head(torch.relu(y) + x + y)


NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, int, int]]] = {
    "grey images": (lambda: nn.Sequential(*block(1, 20), *block(20, 16), *head(16 * 9)), (1, 14, 14)),
    "colour, odd sizes": (lambda: nn.Sequential(*block(3, 16), *block(16, 8), *head(8 * 3 * 2)), (3, 13, 11)),
    "two channels": (lambda: nn.Sequential(*block(2, 8, bias=False), *head(8 * 16)), (2, 8, 9)),
    "stride 2": (
        lambda: nn.Sequential(*block(1, 9, False, stride=2), *block(9, 8, False, stride=2), *head(32)),
        (1, 7, 7),
    ),
    "no affine": (lambda: nn.Sequential(*block(1, 8, affine=False), *block(8, 8, False), *head(8 * 16)), (1, 8, 8)),
    "5x5, unpadded": (
        lambda: nn.Sequential(
            *block(1, 8, kernel_size=5, padding=0), *block(8, 4, kernel_size=2, padding=1), *head(16)
        ),
        (1, 10, 10),
    ),
    "shared values": (Shared, (1, 6, 6)),
}


@contextmanager
def taking(paths: tuple[int, ...]) -> Iterator[None]:
    """Native calls take these paths."""
    settings_of = native_engine._settings

    def with_paths(*arguments: Any) -> tuple[list[Tensor], native.Settings]:
        rates, settings = settings_of(*arguments)
        return rates, replace(settings, paths=paths)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native_engine, "_settings", with_paths)
        yield


def gradients(meta_result: Callable[..., Any], model: nn.Module, tasks: TaskBatch, **options: Any) -> dict[str, Tensor]:
    """Loss, outputs and gradients of parameters and of α, which is a learned tensor of every parameter's shape."""
    g = torch.Generator().manual_seed(3)
    rates = {
        name: (0.05 * (0.5 + torch.rand(p.shape, generator=g, dtype=torch.float64))).to(p.dtype).requires_grad_()
        for name, p in model.named_parameters()
        if options.get("adapt") is None or name in options["adapt"]
    }
    inner = InnerLoop.create(model, **{"inner_lr": rates, "inner_steps": 2, **options})
    result = meta_result(tasks, inner)
    names = [name for name, _ in model.named_parameters()]
    values = torch.autograd.grad(result.loss, [*model.parameters(), *rates.values()], allow_unused=True)
    # The mean takes the bias of a convolution away: its gradient is 0, or noise.
    noise = {f"{path}.bias" for path, layer in model.named_modules() if isinstance(layer, nn.Conv2d)}
    found = {
        name: value
        for name, value in zip([*names, *(f"α of {name}" for name in rates)], values, strict=True)
        if value is not None and name.removeprefix("α of ") not in noise
    }
    return {"loss": result.loss.detach(), "outputs": result.logits, **found}


def by_torch(model: nn.Module, tasks: TaskBatch, **options: Any) -> dict[str, Tensor]:
    def run(tasks: TaskBatch, inner: InnerLoop) -> Any:
        return torch_engine.meta_result(model, dict(model.named_parameters()), tasks, inner)

    return gradients(run, model, tasks, **options)


def by_native(model: nn.Module, tasks: TaskBatch, paths: tuple[int, ...], **options: Any) -> dict[str, Tensor]:
    def run(tasks: TaskBatch, inner: InnerLoop) -> Any:
        return engine.meta_result(model, tasks, inner, engine="native")

    with taking(paths):
        return gradients(run, model, tasks, **options)


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name in expected:
        assert_close(actual[name], expected[name], name)


@pytest.mark.parametrize("paths", PATHS.values(), ids=PATHS)
@pytest.mark.parametrize("net", NETS)
def test_paths_agree_with_the_torch_engine_and_with_plain_layers(net: str, paths: tuple[int, ...]) -> None:
    module, shape = NETS[net]
    model, tasks = make(module), make_tasks(shape, tasks=2)
    options = {"support_weight": 0.5, "step_weights": [0.25, -0.5, 1.0]}
    actual = by_native(model, tasks, paths, **options)
    assert_same(actual, by_torch(model, tasks, **options))
    assert_same(actual, by_native(model, tasks, PLAIN, **options))


SETTINGS: dict[str, dict[str, Any]] = {
    "first order": {"first_order": True},
    "no inner steps": {"inner_steps": 0, "inner_lr": 0.1},
    "head alone adapted": {"adapt": ["9.weight"], "inner_lr": 0.1},
    "first block alone adapted": {"adapt": ["0.weight", "1.bias"]},
    "support statistics": {"bn": "support"},
    "running statistics": {"bn": "running"},
}


@pytest.mark.parametrize("options", [pytest.param(options, id=name) for name, options in SETTINGS.items()])
def test_settings_on_fused_blocks(options: dict[str, Any]) -> None:
    module, shape = NETS["grey images"]
    model, tasks = make(module), make_tasks(shape, tasks=2)
    expected = by_torch(model, tasks, **options)
    assert_same(by_native(model, tasks, PATHS["all"], **options), {k: v for k, v in expected.items() if v is not None})


def test_ragged_tasks() -> None:
    module, shape = NETS["grey images"]
    model, tasks = make(module), ragged(make_tasks(shape))
    assert_same(by_native(model, tasks, PATHS["all"]), by_torch(model, tasks))


def test_inputs_far_from_zero() -> None:
    """The moments of the patches are taken around a provisional mean."""
    module, shape = NETS["colour, odd sizes"]
    model, tasks = make(module), make_tasks(shape, tasks=2)
    tasks = replace(tasks, support_x=tasks.support_x + 300, query_x=tasks.query_x + 300)
    assert_same(by_native(model, tasks, PATHS["all"]), by_torch(model, tasks))


@pytest.mark.parametrize("paths", PATHS.values(), ids=PATHS)
def test_ties_take_the_first_maximum(paths: tuple[int, ...]) -> None:
    """Flat binary images: whole pooling windows are equal, in every layer."""
    module, shape = NETS["grey images"]
    model, tasks = make(module), make_tasks(shape, tasks=2)
    strokes = torch.zeros(2, 1, *shape, dtype=torch.float64)
    strokes[..., 2:9, 4:8] = 1
    support = strokes.repeat(1, 6, 1, 1, 1) * (tasks.support_y % 2)[..., None, None, None]
    query = strokes.flip(-1).repeat(1, 5, 1, 1, 1)
    tasks = replace(tasks, support_x=support, query_x=query)
    assert_same(by_native(model, tasks, paths), by_torch(model, tasks))


@pytest.mark.parametrize("channels", [1, 3])
def test_float32_takes_the_table_look_up(channels: int) -> None:
    """Which float64 does not have: one block, so that no rounding is passed on, against float64's plain layers."""
    model = make(lambda: nn.Sequential(*block(channels, 40), *head(40 * 16)))
    tasks = make_tasks((channels, 8, 8), tasks=2)
    expected = by_native(model, tasks, PLAIN)
    small = TaskBatch(tasks.support_x.float(), tasks.support_y, tasks.query_x.float(), tasks.query_y)
    actual = by_native(model.float(), small, PATHS["all"])
    for name, value in expected.items():
        assert float((actual[name] - value).abs().max() / value.abs().max()) < 1e-4, name


def test_the_plan_names_each_path() -> None:
    module, shape = NETS["grey images"]
    model, tasks = make(module), make_tasks(shape)

    def plan(paths: tuple[int, ...]) -> list[str]:
        with taking(paths):
            call = native_engine.native_call(model, tasks, InnerLoop.create(model, inner_lr=0.1))
        return native.plan(*call).splitlines()

    assert sum("one block" in line for line in plan(PLAIN)) == 0
    fused = plan(PATHS["all"])
    assert sum("one block" in line for line in fused) == 2
    assert "moments of its patches" in fused[0]
    assert "moments of its patches" not in plan(PATHS["block"])[0]
    assert not any("Winograd" in line for line in (*plan(PLAIN), *plan(PATHS["block"]), fused[0]))
    assert "one block, by Winograd's F(" in fused[1]
