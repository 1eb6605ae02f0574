"""The memory of the blocks executor's passes: what nobody reads again shares it, and support passes that do not fit
beside each other are repeated. Neither changes a result; every layer alone and random networks: test_native_engine.py.
"""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from innerloop import engine
from innerloop.explanation import explanation
from innerloop.inner_loop import InnerLoop
from nets import assert_close, make, make_tasks, ragged
from resnet12 import ResNet12

REPEATED, KEPT = (0, 0, 0, 0, 0, 0), (0, 0, 0, 0, 0, 2)

# In whole vectors, so that they lie dense; residuals are read twice.
OPTIONS: dict[str, dict[str, Any]] = {
    "three steps": {"inner_steps": 3},
    "first order": {"inner_steps": 2, "first_order": True},
    "support statistics": {"inner_steps": 2, "bn": "support"},
    "running statistics": {"inner_steps": 2, "bn": "running"},
    "losses at every step": {"inner_steps": 2, "step_weights": [0.5, 0.3, 1.0], "support_weight": 0.7},
    "the last block and the head": {"inner_steps": 3, "adapt": ["layer4", "head"], "support_weight": 0.7},
    "the first block": {"inner_steps": 2, "adapt": ["layer1"], "support_weight": 0.7},
    "the head": {"inner_steps": 2, "adapt": ["head"], "step_weights": [0.5, 0.3, 1.0]},
}


def outcome(name: Any, model: torch.nn.Module, tasks: Any, inner: InnerLoop, rate: Tensor) -> list[Tensor]:
    result = engine.meta_result(model, tasks, inner, None, name)
    wanted = [rate, *model.parameters()]
    gradients = torch.autograd.grad(result.loss, wanted, allow_unused=True, materialize_grads=True)
    return [result.loss.detach(), result.logits, *gradients]


@pytest.mark.parametrize("options", OPTIONS)
def test_a_residual_network(force: Any, options: str) -> None:
    model = make(lambda: ResNet12(channels=(8, 16, 8, 16), outputs=3))
    tasks = ragged(make_tasks((3, 16, 16)))
    rate = torch.tensor(0.05, dtype=torch.float64, requires_grad=True)
    inner = InnerLoop.create(model, inner_lr=rate, **OPTIONS[options])
    expected = outcome("torch", model, tasks, inner, rate)
    found = []
    for paths in (REPEATED, KEPT):
        force(paths)
        found.append(outcome("native", model, tasks, inner, rate))
    for repeated, kept, value in zip(*found, expected, strict=True):
        assert torch.equal(repeated, kept)
        assert_close(kept, value, options)


def test_explain_says_when_passes_are_repeated() -> None:
    model, tasks = ResNet12(channels=(8, 16, 8, 16), outputs=3), make_tasks((3, 32, 32), tasks=1, support=25)
    few, many = (explanation(model.double(), tasks=tasks, inner_steps=steps) for steps in (2, 20))
    assert "support passes: repeated on the way back" not in few
    assert "support passes: repeated on the way back" in many


# Peak memory of a step in a process of its own, in units of one value of the first layer.
_STEP = """
import sys
import torch
from torch import nn
import innerloop
from innerloop import native_engine
from innerloop.bench.memory import peak_megabytes
from innerloop.inner_loop import InnerLoop
from innerloop.ops import maml
from dataclasses import replace

channels, size, samples = 16, 64, 20
layers = [layer for _ in range(4) for layer in (nn.Conv2d(channels, channels, 1), nn.Tanh())]
model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 3))
x, y = torch.randn(1, samples, channels, size, size), torch.arange(samples)[None] % 3
tasks = innerloop.TaskBatch(x, y, x, y)
inner = InnerLoop.create(model, inner_lr=1e-3, inner_steps=int(sys.argv[1]))
*arguments, settings = native_engine.native_call(model, tasks, inner)
before = peak_megabytes()
maml.maml(*arguments, replace(settings, paths=(0, 0, 0, 0, 0, int(sys.argv[2]))))
print((peak_megabytes() - before) * 2**20 / (4 * samples * channels * size * size))
"""


def values_taken(steps: int, kept_passes: int) -> float:
    words = [sys.executable, "-c", _STEP, str(steps), str(kept_passes)]
    return float(subprocess.run(words, check=True, capture_output=True, text=True).stdout)


def test_repeated_passes_take_no_more_memory_for_more_steps() -> None:
    few, many, kept = values_taken(2, 0), values_taken(8, 0), values_taken(8, 2)
    assert many < few + 4
    assert kept > many + 6 * 8  # six more passes of eight values
