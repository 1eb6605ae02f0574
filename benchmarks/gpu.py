"""Times the ops' CUDA kernels beside their plain-torch twins, and beside the time that moving their bytes would take.

    python benchmarks/gpu.py

A call's bytes are those of its inputs and outputs, each once; the bandwidth is that of copying 1 GiB within the device.
Times are of the device, between CUDA events, the median of calls whose arguments are not in its cache.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from innerloop import ops, reference

DEVICE = "cuda"


def random(*shape: int) -> Tensor:
    return torch.randn(shape, device=DEVICE)


def labels(tasks: int, samples: int, classes: int) -> Tensor:
    return (torch.arange(samples, device=DEVICE) % classes).expand(tasks, samples).contiguous()


def lstm(steps: int, coordinates: int, hidden: int) -> tuple[Tensor, ...]:
    weights = (random(4 * hidden, hidden + 3), random(4 * hidden, 2 * hidden + 1), random(hidden + 1))
    return random(steps, coordinates), random(4, hidden, coordinates), *(0.1 * weight for weight in weights)


# Name: the op, its twin, and a maker of arguments that both take.
CALLS: dict[str, tuple[Callable[..., Any], Callable[..., Any], Callable[[], tuple[Any, ...]]]] = {
    "inner_update, 100 M parameters": (
        ops.inner_update,
        reference.inner_update,
        lambda: tuple([random(32, 3_125_000)] for _ in range(3)),
    ),
    "prototypes, 32 tasks, 20-way 5-shot, D = 1600": (
        ops.prototypes,
        reference.prototypes,
        lambda: (random(32, 100, 1600), labels(32, 100, 20), 20),
    ),
    "pairwise_distance, 32 tasks, 300 × 20, D = 1600": (
        ops.pairwise_distance,
        reference.pairwise_distance,
        lambda: (random(32, 300, 1600), random(32, 20, 1600)),
    ),
    "prototype_loss, 32 tasks, 5-way 5-shot, 75 queries, D = 1600": (
        ops.prototype_loss,
        reference.prototype_loss,
        lambda: (random(32, 25, 1600), labels(32, 25, 5), random(32, 75, 1600), labels(32, 75, 5), 5),
    ),
    "ridge_head, 32 tasks, 5-way 5-shot, 75 queries, D = 1600": (
        ops.ridge_head,
        reference.ridge_head,
        lambda: (random(32, 25, 1600), labels(32, 25, 5), random(32, 75, 1600), 5),
    ),
    "coordinate_lstm, 20 steps of 100 k coordinates": (
        ops.coordinate_lstm,
        reference.coordinate_lstm,
        lambda: lstm(20, 100_000, 20),
    ),
}


def milliseconds(call: Callable[[], Any], calls: int = 20) -> float:
    """The median, with the cache swept before each call."""
    sweep = torch.empty(256 << 20, dtype=torch.uint8, device=DEVICE)
    times = []
    for _ in range(3 + calls):
        sweep.zero_()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times[3:])


def bytes_of(tree: Any) -> int:
    return sum(x.numel() * x.element_size() for x in pytree.tree_leaves(tree) if isinstance(x, Tensor))


def main() -> None:
    print(torch.cuda.get_device_name(), "torch", torch.__version__)
    large = torch.empty(1 << 30, dtype=torch.uint8, device=DEVICE)
    bandwidth = 2 * large.numel() / milliseconds(large.clone) / 1e6
    print(f"copies {bandwidth:.0f} GB/s")
    for name, (op, twin, make) in CALLS.items():
        arguments = make()
        with torch.no_grad():
            moved = bytes_of((arguments, op(*arguments))) / 1e6
            own, plain = (milliseconds(partial(function, *arguments)) for function in (op, twin))
        share = moved / own / bandwidth
        print(f"{name}: {own:.3f} ms, {share:.0%} of the bandwidth; plain torch {plain:.3f} ms, {plain / own:.2f} ×")


if __name__ == "__main__":
    main()
