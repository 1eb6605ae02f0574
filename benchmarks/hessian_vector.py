"""Hessian-vector products of a batch of tasks: the native engine beside torch differentiating twice.

    .venv/bin/python benchmarks/hessian_vector.py [--save]

H_support(θ)·v for every task, with a v of its own, float32, one thread, CPU time, the rows in turns in one process;
medians, and the ratio within a turn. All agree in float64, checked first. --save writes
benchmarks/results/hessian_vector.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vmap

from innerloop import TaskBatch
from innerloop.bench.workloads import WORKLOADS, Workload, make_arrays, make_model
from innerloop.norms import is_batch_norm
from innerloop.primitives import hessian_vector_product
from machine import describe

RESULTS = Path(__file__).parent / "results" / "hessian_vector.json"
NAMES = ("sinusoid-k1", "mlp784-k5", "glyphs-k1", "omniglot-k1")

Vectors = dict[str, Tensor]
Rival = Callable[[], Vectors]


def rivals(workload: Workload, dtype: str) -> dict[str, Rival]:
    """Products [T, *shape] by name, each made by what has the title."""
    model = make_model(workload, dtype).train()  # BatchNorm: transductive, for all
    tasks = TaskBatch(*map(torch.from_numpy, make_arrays(workload, dtype)))
    random = torch.Generator().manual_seed(2)
    v = {
        name: torch.randn(tasks.num_tasks, *p.shape, generator=random, dtype=p.dtype)
        for name, p in model.named_parameters()
    }
    found: dict[str, Rival] = {
        "innerloop": lambda: hessian_vector_product(model, tasks, v, loss=workload.loss, engine="native"),
        "double backward": lambda: double_backward(model, tasks, v, workload.loss),
    }
    if not any(map(is_batch_norm, model.modules())):  # whose second order under torch.func is wrong
        found["jvp of grad, vmap"] = lambda: forward_over_reverse(model, tasks, v, workload.loss)
    return found


def support_loss(model: nn.Module, theta: Any, x: Tensor, y: Tensor, loss: str) -> Tensor:
    outputs = functional_call(model, theta, (x,))
    if loss == "mse":  # F.mse_loss fails under jvp of grad in torch 2.13
        return (outputs - y).square().mean()
    return F.cross_entropy(outputs, y)


def double_backward(model: nn.Module, tasks: TaskBatch, v: Vectors, loss: str) -> Vectors:
    """A task after another: the gradient of ∇L·v."""
    products = []
    for task in range(tasks.num_tasks):
        theta = {name: p.detach().requires_grad_() for name, p in model.named_parameters()}
        value = support_loss(model, theta, tasks.support_x[task], tasks.support_y[task], loss)
        gradients = torch.autograd.grad(value, list(theta.values()), create_graph=True)
        products.append(torch.autograd.grad(gradients, list(theta.values()), [v[name][task] for name in theta]))
    return {name: torch.stack(each) for name, each in zip(v, zip(*products, strict=True), strict=True)}


def forward_over_reverse(model: nn.Module, tasks: TaskBatch, v: Vectors, loss: str) -> Vectors:
    """All tasks at once: the tangent of ∇L along v."""
    theta = {name: p.detach() for name, p in model.named_parameters()}

    def product(along: Vectors, x: Tensor, y: Tensor) -> Vectors:
        gradient = grad(lambda parameters: support_loss(model, parameters, x, y, loss))
        tangent: Vectors = jvp(gradient, (theta,), (along,))[1]
        return tangent

    products: Vectors = vmap(product)(v, tasks.support_x, tasks.support_y)
    return products


def check(workload: Workload) -> float:
    """The largest relative difference of any rival from the double backward in float64.

    Raises:
        AssertionError: one computes something else.
    """
    few = replace(workload, tasks=min(workload.tasks, 4))
    products = {title: rival() for title, rival in rivals(few, "float64").items()}
    expected = products.pop("double backward")
    scale = max(float(value.abs().max()) for value in expected.values())
    differences = [
        float((found[name] - value).abs().max()) / scale
        for found in products.values()
        for name, value in expected.items()
    ]
    assert max(differences) < 1e-9, (workload.name, differences)
    return max(differences)


def measure(workload: Workload, rounds: int) -> dict[str, Any]:
    contestants = rivals(workload, "float32")
    taken: dict[str, list[float]] = {title: [] for title in contestants}
    for number in range(rounds + 1):  # the first is warming up
        for title, rival in contestants.items():
            start = time.process_time()
            rival()
            if number:
                taken[title].append(1000 * (time.process_time() - start))
    ours = taken["innerloop"]
    return {
        title: {
            "ms": statistics.median(times),
            "ratio": statistics.median(a / b for a, b in zip(times, ours, strict=True)),
        }
        for title, times in taken.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--save", action="store_true", help=f"write benchmarks/results/{RESULTS.name}")
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = {}
    print("| | innerloop, ms | torch, double backward, ms | torch.func, vmap of jvp of grad, ms |\n|---|---|---|---|")
    for name in NAMES:
        workload = WORKLOADS[name]
        difference = check(workload)
        row = measure(workload, arguments.rounds)
        rows[name] = {"difference_float64": difference, **row}
        print("| " + " | ".join([title_of(workload), *cells(row)]) + " |", flush=True)
    if arguments.save:
        RESULTS.write_text(
            json.dumps({"rounds": arguments.rounds, "rows": rows, "machine": describe()}, indent=1) + "\n"
        )


def title_of(workload: Workload) -> str:
    return f"{workload.title}: T = {workload.tasks}, {workload.support} samples"


def cells(row: dict[str, Any]) -> list[str]:
    found = [f"{row['innerloop']['ms']:.3g}"]
    for title in ("double backward", "jvp of grad, vmap"):
        found.append(f"{row[title]['ms']:.3g} (×{row[title]['ratio']:.1f})" if title in row else "–")
    return found


if __name__ == "__main__":
    main()
