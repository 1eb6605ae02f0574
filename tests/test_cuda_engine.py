"""The engine on CUDA, emulated and on a GPU where there is one, against the torch engine on the CPU in float64: the
nets and inner loops of test_engine_layers.py and the drawn cases of test_native_engine.py."""

from __future__ import annotations

import contextlib
import re
import resource
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import emulated
import innerloop
from innerloop import TaskBatch, _library, engine, native_engine, torch_engine
from innerloop.explanation import explanation
from innerloop.inner_loop import InnerLoop
from innerloop.ops import maml as native
from nets import make, make_tasks, ragged
from test_emulation import run_under_sanitizer
from test_engine_layers import (
    MODES,
    NETS,
    PER_ELEMENT,
    PER_STEP,
    PLAIN,
    SETTINGS,
    SPECIALISED,
    Net,
    Outcome,
    Settings,
    assert_same,
    by_native,
    by_torch,
    inner_loop,
    on_images,
    tensors_of,
)
from test_native_engine import COMMON, Case, assert_agree, cases

# What a layer does: two derivatives with every kind of weight and α, masks, and what a part that is not adapted needs.
FOR_EVERY_LAYER = ["3 steps, all losses", "2 steps, masks", "head alone adapted"]
# What the executor does, on nets that together have every kind of parameter, branch and statistic.
EVERY_SETTING = {**SETTINGS, **MODES}
FOR_EVERY_SETTING = ["linear, three in a row", "two convolution blocks", "add: a residual", "batch_norm on vectors"]


def on_device(model: nn.Module, settings: Settings, tasks: TaskBatch, device: str, paths: tuple[int, ...]) -> Outcome:
    """What the native engine computes there, on the CPU again."""
    moved = model.to(device)
    parameters = {name: value.detach().to(device) for name, value in tensors_of(model, settings, len(tasks)).items()}
    for value in parameters.values():
        value.requires_grad_()
    outcome = by_native(moved, parameters, tasks.to(device), inner_loop(moved, settings), paths)
    return {name: value.detach().cpu() for name, value in outcome.items()}


def expected_and_actual(net: Net, settings: Settings, device: str, paths: tuple[int, ...]) -> tuple[Outcome, Outcome]:
    module, shape = net
    model = make(module)
    tasks = make_tasks(shape, tasks=settings.get("tasks", 2), out=3 if settings.get("regression") else None)
    if settings.get("ragged"):
        tasks = ragged(tasks)
    expected = by_torch(model, tensors_of(model, settings, len(tasks)), tasks, inner_loop(model, settings))
    return expected, on_device(model, settings, tasks, device, paths)


def check(net: Net, settings: Settings, device: str, paths: tuple[int, ...] = SPECIALISED) -> None:
    expected, actual = expected_and_actual(net, settings, device, paths)
    assert_same(actual, expected)


@pytest.mark.parametrize("setting", FOR_EVERY_LAYER)
@pytest.mark.parametrize("net", NETS)
def test_a_layer_computes_what_the_torch_engine_does(net: str, setting: str, kernels: str) -> None:
    check(NETS[net], SETTINGS[setting], kernels)


@pytest.mark.parametrize("setting", EVERY_SETTING)
@pytest.mark.parametrize("net", FOR_EVERY_SETTING)
def test_an_inner_loop_computes_what_the_torch_engine_does(net: str, setting: str, kernels: str) -> None:
    check(NETS[net], EVERY_SETTING[setting], kernels)


@pytest.mark.parametrize("setting", ["3 steps, all losses", "2 steps, masks", "2 steps, masks, bn support"])
def test_batch_norm_relu_and_pool_apart_compute_the_same(setting: str, kernels: str) -> None:
    check(NETS["two convolution blocks"], EVERY_SETTING[setting], kernels, PLAIN)


BEHIND_BATCH_NORM = {
    "relu": [nn.ReLU()],
    "relu and a pool that leaves a rest": [nn.ReLU(), nn.MaxPool2d(4)],
    "relu and a pool of 3 × 2": [nn.ReLU(), nn.MaxPool2d((3, 2))],
    "relu and an overlapping pool": [nn.ReLU(), nn.MaxPool2d(3, 2, 1)],
    "a pool": [nn.MaxPool2d(2)],
}


@pytest.mark.parametrize("setting", ["3 steps, all losses", "2 steps, masks, bn support"])
@pytest.mark.parametrize("behind", BEHIND_BATCH_NORM)
def test_what_stands_behind_batch_norm(behind: str, setting: str, kernels: str) -> None:
    net = (lambda: on_images(nn.BatchNorm2d(3), *BEHIND_BATCH_NORM[behind])), (2, 7, 6)
    check(net, EVERY_SETTING[setting], kernels)


@settings(COMMON, max_examples=25)
@given(case=cases())
def test_drawn_cases(case: Case, emulation: None) -> None:
    assert_agree(case)


def test_float32(kernels: str) -> None:
    settings = {"steps": 2, "w": [0.5, 1.0, 2.0], "u": 0.7, "α": PER_STEP}
    module, shape = NETS["gelu by erf"]
    model, tasks = make(module), make_tasks(shape, tasks=2)
    expected = by_torch(model, tensors_of(model, settings, 2), tasks, inner_loop(model, settings))
    single = on_device(model.float(), settings, tasks.to(torch.float32), kernels, SPECIALISED)
    assert_same({name: value.double() for name, value in single.items()}, expected, tolerance=1e-3)


def test_the_same_bits_every_time(kernels: str) -> None:
    first, second = (
        expected_and_actual(NETS["two convolution blocks"], SETTINGS["2 steps, masks"], kernels, SPECIALISED)[1]
        for _ in range(2)
    )
    assert all(torch.equal(first[name], second[name]) for name in first)


# --- chunks of tasks, and memory --------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [1, 2, 3, 4])
def test_task_chunk_changes_nothing(chunk: int, kernels: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INNERLOOP_TASK_CHUNK", str(chunk))
    for setting in ("2 steps, masks", "own parameters for each task"):
        check(NETS["two convolution blocks"], {**SETTINGS[setting], "tasks": 3}, kernels)


@pytest.mark.parametrize("chunk", ["0", "-1", "many", "2.5"])
def test_a_task_chunk_that_is_none_is_refused(chunk: str, kernels: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INNERLOOP_TASK_CHUNK", chunk)
    with pytest.raises(RuntimeError, match=f"INNERLOOP_TASK_CHUNK is '{re.escape(chunk)}', expected a positive number"):
        check(NETS["linear"], SETTINGS["1 step"], kernels)


@pytest.fixture
def little_memory() -> Iterator[None]:
    """An allocation of more than 64 GiB fails."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (64 << 30, hard))
    yield
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def call_without_memory() -> None:
    model = make(lambda: nn.Sequential(nn.Linear(6, 2000), nn.Tanh(), nn.Linear(2000, 3)))
    innerloop.maml_loss(model, make_tasks((6,), tasks=500), inner_lr=0.01, inner_steps=500, engine="native")


def test_without_memory_the_error_names_a_task_chunk_that_fits(emulation: None, little_memory: None) -> None:
    """The emulated device says that 1 GiB is free, of which 64 MiB are left for cuBLAS."""
    with pytest.raises(RuntimeError, match="maml: out of memory: 500 tasks at once need") as raised:
        call_without_memory()
    found = re.search(r"need (\d+) bytes, and (\d+) are free: INNERLOOP_TASK_CHUNK=(\d+) would fit", str(raised.value))
    assert found is not None
    asked, free, chunk = (int(group) for group in found.groups())
    assert asked > 64 << 30
    assert free == 1 << 30
    assert chunk * asked / 500 <= free - (64 << 20) < (chunk + 1.1) * asked / 500


def test_an_error_of_the_device_is_not_said_to_be_one_of_memory(
    emulation: None, little_memory: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After an illegal access, say, the device answers nothing, and torch's error is passed on."""
    monkeypatch.setenv("EMULATION_LOST_DEVICE", "1")
    with pytest.raises(RuntimeError) as raised:
        call_without_memory()
    assert "out of memory" not in str(raised.value)


# --- what else the engine offers --------------------------------------------------------------------


def test_adaptation_and_hessian_vector_products(kernels: str) -> None:
    module, shape = NETS["two convolution blocks"]
    model, tasks = make(module), make_tasks(shape)
    inner = InnerLoop.create(model, inner_lr=0.1, inner_steps=2)
    parameters = {name: value.detach() for name, value in model.named_parameters()}
    vectors = {name: torch.randn(3, *value.shape, dtype=value.dtype) for name, value in parameters.items()}
    expected = [
        torch_engine.adapt_tasks(model, parameters, tasks, inner, 0.0),
        torch_engine.adapt_tasks(model, parameters, tasks, inner, 0.3),
        torch_engine.hessian_vector_products(model, parameters, tasks, vectors, inner),
    ]
    model, tasks = model.to(kernels), tasks.to(kernels)
    inner = InnerLoop.create(model, inner_lr=0.1, inner_steps=2)
    vectors = {name: value.to(kernels) for name, value in vectors.items()}
    actual = [
        engine.adapt_tasks(model, tasks, inner, engine="native"),
        engine.adapt_tasks(model, tasks, inner, engine="native", proximal=0.3),
        engine.hessian_vector_products(model, tasks, vectors, inner, engine="native"),
    ]
    for found, wanted in zip(actual, expected, strict=True):
        assert_same({name: found[name].cpu() for name in wanted}, wanted)


def test_explain_names_the_layers(kernels: str) -> None:
    module, shape = NETS["two convolution blocks"]
    text = explanation(make(module).to(kernels), tasks=make_tasks(shape).to(kernels))
    assert "batch_norm + relu + max_pool: one layer\n" in text


def test_a_label_without_an_output_makes_the_loss_nan(emulation: None) -> None:
    """The op does not wait for the GPU to look at labels; TaskBatch has done that before."""
    model, tasks = make(lambda: nn.Linear(6, 3)), make_tasks((6,))
    call = native_engine.native_call(model, tasks, InnerLoop.create(model, inner_lr=0.1))
    tasks.query_y[1, 2] = 3
    loss, task_losses, _ = native.maml(*call)
    assert loss.isnan()
    assert task_losses.isnan().tolist() == [False, True, False]


# --- which engine runs tasks on CUDA ------------------------------------------------------------------


def on_cuda(tasks: TaskBatch) -> TaskBatch:
    """Tasks that say they are on CUDA, on any machine."""
    with FakeTensorMode():
        object.__setattr__(tasks, "support_x", torch.empty(tasks.support_x.shape, dtype=torch.float64, device="cuda"))
    return tasks


def test_auto_leaves_cuda_to_the_torch_engine_and_explain_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tasks = make(lambda: nn.Linear(6, 3)), make_tasks((6,))
    assert native_engine.why_not_unasked(tasks) is None
    reason = "tasks are on cuda:0, and its CUDA form has not been run on a GPU yet"
    assert str(native_engine.why_not_unasked(on_cuda(tasks))).startswith(reason)
    monkeypatch.setattr(native_engine, "why_not_native", lambda *_: None)
    monkeypatch.setattr(native, "plan", lambda *_: "linear")
    monkeypatch.setattr(native_engine, "native_call", lambda *_: ())
    assert f'engine="auto" computes with the torch engine: {reason}' in explanation(model, tasks=tasks)


@pytest.mark.skipif(_library.cuda_loaded, reason="the CUDA library is here")
def test_without_the_cuda_library_native_says_so() -> None:
    model, tasks = make(lambda: nn.Linear(6, 3)), on_cuda(make_tasks((6,)))
    reason = native_engine.why_not_native(model, tasks, InnerLoop.create(model, inner_lr=0.1))
    assert reason == "tasks are on cuda:0, and this installation has no CUDA library"


# --- errors, and CUDA graphs ------------------------------------------------------------------------


@pytest.fixture(params=["maml", "maml_adapt", "hessian_vector_product"])
def engine_call(request: pytest.FixtureRequest) -> tuple[str, Callable[[], object]]:
    """An op of the engine, by name, and a call of it on every kind of layer."""
    model, tasks = make(every_layer), ragged(make_tasks((1, 4, 4)))
    inner = InnerLoop.create(model, inner_lr=0.1, inner_steps=1)
    vectors = {name: torch.ones(3, *value.shape, dtype=value.dtype) for name, value in model.named_parameters()}
    learned = torch.full((1,), 0.1, dtype=torch.float64, requires_grad=True)

    def meta_gradient() -> list[Tensor]:
        loss = innerloop.maml_loss(
            model, tasks, inner_lr=learned, inner_steps=1, step_weights=[0.5, 1.0], support_weight=0.7, engine="native"
        )
        return [loss.detach(), *torch.autograd.grad(loss, [*model.parameters(), learned])]

    calls: dict[str, Callable[[], object]] = {
        "maml": meta_gradient,
        "maml_adapt": lambda: engine.adapt_tasks(model, tasks, inner, engine="native", proximal=0.3),
        "hessian_vector_product": lambda: engine.hessian_vector_products(model, tasks, vectors, inner, engine="native"),
    }
    return request.param, calls[request.param]


def test_every_launch_is_checked_and_its_error_names_the_op(
    engine_call: tuple[str, Callable[[], object]], emulation: None
) -> None:
    assert emulated.failing_launches(*engine_call) > 20


def test_a_step_waits_for_nothing_while_a_graph_is_captured(
    engine_call: tuple[str, Callable[[], object]], emulation: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where it waited, or copied from the device or to it, that would be an error, as on a GPU."""
    _, call = engine_call
    expected = call()
    monkeypatch.setenv("EMULATION_CAPTURES", "1")
    torch.testing.assert_close(call(), expected, rtol=0, atol=0)


class NothingIsCopied(TorchDispatchMode):
    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        assert function not in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default), function
        return function(*arguments, **(options or {}))


@pytest.mark.parametrize("inner_lr", [0.1, {"weight": 0.1, "*": 0.2}], ids=["a number", "by name"])
def test_learning_rates_are_not_copied_to_the_device(inner_lr: Any) -> None:
    """Which would wait for it, in every step, and cannot be captured. The device is one that only says it is CUDA."""
    with FakeTensorMode():
        model = nn.ParameterDict({name: torch.empty(3, device="cuda") for name in ("weight", "bias")})
        with NothingIsCopied():
            inner = InnerLoop.create(model, inner_lr=inner_lr)
    assert {rate.value.device.type for rate in inner.rates.values()} == {"cuda"}


def test_a_step_is_captured_in_a_cuda_graph(cuda: torch.device) -> None:
    module, shape = NETS["two convolution blocks"]
    model, tasks = make(module).to(cuda), make_tasks(shape).to(cuda)

    def step() -> list[Tensor]:
        loss = innerloop.maml_loss(model, tasks, inner_lr=0.1, inner_steps=2, engine="native")
        return list(torch.autograd.grad(loss, list(model.parameters())))

    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        expected = step()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        actual = step()
    graph.replay()
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=0, atol=0)


# --- under sanitizers -------------------------------------------------------------------------------


@pytest.mark.sanitizers
@pytest.mark.parametrize("flavour", ["tsan", "asan"])
def test_the_engine_under_sanitizers(flavour: str) -> None:
    done = run_under_sanitizer(flavour, emulated.build(flavour), Path(__file__))
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout == "the engines agree\n"


def every_layer() -> nn.Module:
    """As small as can be: a sanitizer watches a thread for each CUDA thread."""
    return nn.Sequential(
        *(nn.Conv2d(1, 2, 3, padding=1), nn.BatchNorm2d(2), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(2, 2, 1), nn.GroupNorm(1, 2), nn.Tanh(), nn.MaxPool2d(2, 1, 1), nn.AvgPool2d(2, 1, 1)),
        *(nn.Flatten(), nn.LayerNorm(32), nn.Linear(32, 3)),
    )


def main(place: str) -> None:
    """A net of all layers, for a process that a sanitizer watches: on a device, or on the emulated kernels of a
    library."""
    emulation = (
        contextlib.nullcontext()
        if place in ("cuda", "cpu")
        else emulated.in_place_of_cpu_ops(emulated.load(Path(place)))
    )
    device = "cuda" if place == "cuda" else "cpu"
    with emulation:
        for alpha in (PER_STEP, PER_ELEMENT):
            settings = {"steps": 1, "w": [0.5, 1.0], "u": 0.7, "ragged": True, "α": alpha}
            check((every_layer, (1, 4, 4)), settings, device)
    print("the engines agree")


if __name__ == "__main__":
    main(*sys.argv[1:])
