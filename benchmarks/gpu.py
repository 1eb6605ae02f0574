"""Times every op's CUDA kernels beside the time that their bytes and their arithmetic would take at the least, and
what a user calls beside its plain-torch twin.

    python benchmarks/gpu.py
    python benchmarks/gpu.py --device cpu --quick      does everything run? on the CPU, at small sizes

A call's bytes are those of its inputs and outputs, each once; its FLOPs are counted by hand below. The least time is
the larger one of bytes over bandwidth, that of copying 1 GiB within the device, and FLOPs over the peak of torch.mm in
the dtype that counts, without TF32. Times are of the device, between CUDA events, the median of calls whose arguments
are not in its cache.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from innerloop import ops, reference

F32, F64 = torch.float32, torch.float64
Arguments = tuple[Any, ...]


@dataclass(frozen=True)
class Sizes:
    """T tasks of S support samples and Q queries, of N classes, in D dimensions; P parameters of the inner update; K
    steps of the learned optimizer on C coordinates with a state of H."""

    T: int = 32
    N: int = 5
    S: int = 25
    Q: int = 75
    D: int = 1600
    P: int = 3_125_000
    K: int = 20
    C: int = 100_000
    H: int = 20


QUICK = Sizes(T=2, D=64, P=1000, K=2, C=300, H=3)


@dataclass(frozen=True)
class Kernel:
    """Of a raw op: arguments, FLOPs, and the dtype that these are of."""

    arguments: Arguments
    flops: float
    dtype: torch.dtype = F32


class Make:
    """Arguments on a device."""

    def __init__(self, n: Sizes, device: str) -> None:
        self.n, self.device = n, device

    def random(self, *shape: int, dtype: torch.dtype = F32) -> Tensor:
        return torch.randn(shape, dtype=dtype, device=self.device)

    def labels(self, samples: int) -> Tensor:
        return (torch.arange(samples, device=self.device) % self.n.N).expand(self.n.T, samples).contiguous()

    def embeddings(self) -> Arguments:
        n = self.n
        return self.random(n.T, n.S, n.D), self.labels(n.S), self.random(n.T, n.Q, n.D)

    def lstm(self) -> tuple[Tensor, ...]:
        n = self.n
        weights = (self.random(4 * n.H, n.H + 3), self.random(4 * n.H, 2 * n.H + 1), self.random(n.H + 1))
        return self.random(n.K, n.C), self.random(4, n.H, n.C), *(0.1 * weight for weight in weights)

    def gram(self) -> Tensor:
        rows = self.random(self.n.T, self.n.S, self.n.D, dtype=F64)
        return rows @ rows.mT


def kernels(make: Make) -> dict[str, Kernel]:
    """Of every raw op but the engine's."""
    n, random = make.n, make.random
    support, labels, queries = make.embeddings()
    of_means, means, gram = random(n.T, n.N), random(n.T, n.N, n.D), make.gram()
    pairs = n.T * n.Q * n.N * n.D
    averages = n.T * n.S * n.D
    lstm = make.lstm()
    cell = 2.0 * n.K * n.C * (4 * n.H * (n.H + 3) + 4 * n.H * (2 * n.H + 1) + n.H)
    wide = {"dtype": F64}
    iterations = float(torch.ops.innerloop.svm_solve(gram, labels, n.N, 0.1, 50, 1e-10)[3].sum())
    kkt = (n.N + 1 / 3) * n.S**3  # factors, their inverses and the sum of these; and one factor more
    return {
        "inner_update": Kernel(tuple([random(n.T, n.P)] for _ in range(3)), 2.0 * n.T * n.P),
        "prototypes": Kernel((support, labels, n.N), averages),
        "prototypes_backward": Kernel((means, of_means, labels), averages),
        "squared_distances": Kernel((queries, means), 3.0 * pairs),
        "squared_distances_backward": Kernel((random(n.T, n.Q, n.N), queries, means), 6.0 * pairs),
        "prototype_logits": Kernel((support, labels, queries, n.N, 1.0), averages + 3.0 * pairs),
        "prototype_loss": Kernel((support, labels, queries, make.labels(n.Q), n.N, 1.0), averages + 3.0 * pairs),
        "prototype_logits_backward": Kernel(
            (random(n.T, n.Q, n.N), random(n.T), labels, queries, means, of_means, 1.0), averages + 6.0 * pairs
        ),
        "class_logsumexp": Kernel((random(n.T, n.Q, n.S), labels, n.N), 3.0 * n.T * n.Q * n.S),
        "inner_products": Kernel((queries, means, False), 2.0 * pairs),
        "gram_matrix": Kernel((support,), 2.0 * n.T * n.S * n.S * n.D, **wide),
        "combine_rows": Kernel((random(n.T, n.N, n.S), support), 2.0 * n.T * n.N * n.S * n.D),
        "solve_positive_definite": Kernel(
            (gram, random(n.T, n.S, n.N, dtype=F64)), n.T * (n.S**3 / 3 + 2 * n.S**2 * n.N), **wide
        ),
        "svm_solve": Kernel((gram, labels, n.N, 0.1, 50, 1e-10), iterations * kkt, **wide),
        "svm_kkt_solve": Kernel(
            (random(n.T, n.S, n.N, dtype=F64), gram, torch.ones_like(gram[:, :, : n.N]), labels), n.T * kkt, **wide
        ),
        "coordinate_lstm": Kernel((*lstm, 10.0), cell),
        "coordinate_lstm_backward": Kernel((random(n.K, n.C), None, *lstm, 10.0, True), 4.0 * cell),
    }


def calls(make: Make) -> dict[str, tuple[Callable[..., Any], Callable[..., Any], Arguments]]:
    """What a user calls: the op, its twin, and arguments that both take."""
    n = make.n
    support, labels, queries = make.embeddings()
    return {
        "inner_update": (ops.inner_update, reference.inner_update, tuple([make.random(n.T, n.P)] for _ in range(3))),
        "prototypes": (ops.prototypes, reference.prototypes, (support, labels, n.N)),
        "pairwise_distance": (
            ops.pairwise_distance,
            reference.pairwise_distance,
            (queries, make.random(n.T, n.N, n.D)),
        ),
        "prototype_loss": (
            ops.prototype_loss,
            reference.prototype_loss,
            (support, labels, queries, make.labels(n.Q), n.N),
        ),
        "ridge_head": (ops.ridge_head, reference.ridge_head, (support, labels, queries, n.N)),
        "svm_head": (ops.svm_head, reference.svm_head, (support, labels, queries, n.N)),
        "coordinate_lstm": (ops.coordinate_lstm, reference.coordinate_lstm, make.lstm()),
    }


class Clock:
    """Milliseconds of a call, on a device."""

    def __init__(self, device: str, calls: int) -> None:
        self.device, self.calls = device, calls
        self.sweep = torch.empty((256 << 20) if device == "cuda" else 0, dtype=torch.uint8, device=device)

    def median(self, call: Callable[[], Any]) -> float:
        """With the cache swept before each call."""
        times = []
        for _ in range(3 + self.calls):
            self.sweep.zero_()
            times.append(self._of_cuda(call) if self.device == "cuda" else self._of_cpu(call))
        return statistics.median(times[3:])

    def _of_cuda(self, call: Callable[[], Any]) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end)

    def _of_cpu(self, call: Callable[[], Any]) -> float:
        begin = time.perf_counter()
        call()
        return 1e3 * (time.perf_counter() - begin)


def bytes_of(tree: Any) -> int:
    return sum(x.numel() * x.element_size() for x in pytree.tree_leaves(tree) if isinstance(x, Tensor))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--quick", action="store_true", help="small sizes, one call each: does everything run?")
    arguments = parser.parse_args()
    device = arguments.device
    if device == "cuda" and not torch.cuda.is_available():
        raise SystemExit(f"gpu.py: torch {torch.__version__} sees no CUDA device (--device cpu --quick is a dry run)")
    torch.backends.cuda.matmul.allow_tf32 = False
    make, clock = Make(QUICK if arguments.quick else Sizes(), device), Clock(device, 1 if arguments.quick else 20)
    print(torch.cuda.get_device_name() if device == "cuda" else "CPU, a dry run", "torch", torch.__version__, make.n)

    large = torch.empty(1 << (20 if arguments.quick else 30), dtype=torch.uint8, device=device)
    bandwidth = 2 * large.numel() / clock.median(large.clone) / 1e6
    peaks = {}
    for dtype in (F32, F64):
        side = 256 if arguments.quick else 8192
        square = make.random(side, side, dtype=dtype)
        peaks[dtype] = 2 * side**3 / clock.median(partial(torch.mm, square, square)) / 1e6
    print(f"copies {bandwidth:.0f} GB/s; torch.mm {peaks[F32]:.0f} GFLOP/s in float32, {peaks[F64]:.0f} in float64")
    del large, square

    print("\nraw op: milliseconds, MB, MFLOP, share of the least time that one or the other takes")
    with torch.no_grad():
        for name, kernel in kernels(make).items():
            op = getattr(torch.ops.innerloop, name)
            moved = bytes_of((kernel.arguments, op(*kernel.arguments)))
            own = clock.median(partial(op, *kernel.arguments))
            of_bytes, of_flops = moved / bandwidth / 1e6, kernel.flops / peaks[kernel.dtype] / 1e6
            bound = "bandwidth" if of_bytes > of_flops else "arithmetic"
            share = max(of_bytes, of_flops) / own
            print(
                f"{name:28} {own:10.4f} ms {moved / 1e6:10.2f} MB {kernel.flops / 1e6:10.1f} MFLOP "
                f"{share:7.1%} of {bound}"
            )
        print("\nwhat a user calls, beside plain torch")
        for name, (function, twin, given) in calls(make).items():
            own, plain = (clock.median(partial(each, *given)) for each in (function, twin))
            print(f"{name:28} {own:10.4f} ms; plain torch {plain:10.4f} ms, {plain / own:.2f} ×")


if __name__ == "__main__":
    main()
