"""The table of op cases that the tests of the ops go through. Run as a program, on a device or on the CPU, it compares
every op with its twin once and prints the instruction set that did the work: the quick form for builds that have no
test tools beside them, and for compute-sanitizer."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from innerloop import ops, reference

Tensors = tuple[Tensor, ...]


@dataclass(frozen=True)
class OpCase:
    """A checked op and its twin as functions of the tensors they are differentiable in.

    Args:
        shapes: of those tensors. The first dimension of each is tasks.
        op, twin: from the tensors to a tensor or a tuple of tensors; other arguments are bound.
        accuracy: how near they are in float64.
    """

    name: str
    shapes: tuple[tuple[int, ...], ...]
    op: Callable[..., Tensor | Tensors]
    twin: Callable[..., Tensor | Tensors]
    accuracy: float = 1e-12

    def inputs(self, dtype: torch.dtype = torch.float64, device: str = "cpu", seed: int = 0) -> Tensors:
        g = torch.Generator().manual_seed(seed)
        return tuple(torch.randn(shape, generator=g, dtype=torch.float64).to(device, dtype) for shape in self.shapes)

    def __str__(self) -> str:
        return self.name


def as_tuple(output: Tensor | Tensors) -> Tensors:
    return output if isinstance(output, tuple) else (output,)


LABELS = torch.tensor([[2, 0, 1, 1, 0], [0, 1, 2, 2, 2]])  # classes of different sizes, in any order
MASK = torch.tensor([[True, True, True, False, True], [True, True, True, False, False]])


def _prototypes(function: Callable[..., Tensor], mask: Tensor | None) -> Callable[[Tensor], Tensor]:
    return lambda x: function(x, LABELS.to(x.device), 3, mask=None if mask is None else mask.to(x.device))


def _distance(function: Callable[..., Tensor], **options: object) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda queries, prototypes: function(queries, prototypes, **options)


QUERY_LABELS = torch.tensor([[1, 0, 2], [2, 2, 0]])
QUERY_MASK = torch.tensor([[True, False, True], [True, True, True]])


def classifying(name: str, **options: object) -> OpCase:
    """An op over a support set with LABELS, of the embeddings of support and queries: its first or only output."""

    def bound(function: Callable[..., Tensor | Tensors]) -> Callable[[Tensor, Tensor], Tensor]:
        def call(support: Tensor, queries: Tensor) -> Tensor:
            given = {key: x.to(support.device) if isinstance(x, Tensor) else x for key, x in options.items()}
            labels = LABELS.to(support.device)
            if name == "attention_classify":
                return as_tuple(function(queries, support, labels, 3, **given))[0]
            if name == "prototype_loss":
                return as_tuple(function(support, labels, queries, QUERY_LABELS.to(support.device), 3, **given))[0]
            return as_tuple(function(support, labels, queries, 3, **given))[0]

        return call

    variant = "-".join("masked" if key.endswith("mask") else f"{key}={value}" for key, value in options.items())
    shapes = ((2, 5, 3), (2, 3, 3))
    return OpCase(f"{name}-{variant}".rstrip("-"), shapes, bound(getattr(ops, name)), bound(getattr(reference, name)))


def _ridge(function: Callable[..., Tensor], samples: int, mask: Tensor | None = None) -> Callable[..., Tensor]:
    """Of support set, queries and the logarithm of the regularization."""

    def call(support: Tensor, queries: Tensor, log_rate: Tensor) -> Tensor:
        labels = LABELS[:, :samples].to(support.device)
        valid = None if mask is None else mask[:, :samples].to(support.device)
        return function(support, labels, queries, 3, regularization=log_rate.exp(), mask=valid)

    return call


def _regression(function: Callable[..., Tensor]) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Of support set, targets and queries."""
    return lambda support, targets, queries: function(support, targets, queries, 2, regularization=0.5)


def _svm(function: Callable[..., Tensor], mask: Tensor | None = None, **options: float) -> Callable[..., Tensor]:
    if function is ops.svm_head:
        options["tolerance"] = 1e-14  # as near as float64 comes, for derivatives by differences

    def call(support: Tensor, queries: Tensor) -> Tensor:
        valid = None if mask is None else mask.to(support.device)
        return function(support, LABELS.to(support.device), queries, 3, mask=valid, **options)

    return call


def updates(function: Callable[..., list[Tensor]], lr: list[Tensor | float] | None = None) -> Callable[..., Tensors]:
    """Of parameters, gradients and, where lr is None, rates."""

    def call(*tensors: Tensor) -> Tensors:
        count = len(tensors) // (3 if lr is None else 2)
        params, grads, rates = tensors[:count], tensors[count : 2 * count], list(tensors[2 * count :])
        return tuple(function(params, grads, rates if lr is None else lr))

    return call


PARAMETERS = ((2, 3), (2, 2, 2))

CASES = [
    OpCase(
        "inner_update-one_rate",
        PARAMETERS * 2,
        updates(ops.inner_update, [0.1, 0.1]),
        updates(reference.inner_update, [0.1, 0.1]),
    ),
    OpCase(
        "inner_update-rate_of_each_parameter",
        (*PARAMETERS * 2, (), ()),
        updates(ops.inner_update),
        updates(reference.inner_update),
    ),
    OpCase(
        "inner_update-rate_of_each_element",
        PARAMETERS * 3,
        updates(ops.inner_update),
        updates(reference.inner_update),
    ),
    OpCase(
        "inner_update-rate_that_broadcasts",
        (*PARAMETERS * 2, (3,), (2, 1, 1)),
        updates(ops.inner_update),
        updates(reference.inner_update),
    ),
    OpCase("prototypes", ((2, 5, 3),), _prototypes(ops.prototypes, None), _prototypes(reference.prototypes, None)),
    OpCase(
        "prototypes-masked", ((2, 5, 3),), _prototypes(ops.prototypes, MASK), _prototypes(reference.prototypes, MASK)
    ),
    *(
        OpCase(
            f"pairwise_distance-{metric}",
            ((2, 3, 4), (2, 2, 4)),
            _distance(ops.pairwise_distance, metric=metric, temperature=temperature),
            _distance(reference.pairwise_distance, metric=metric, temperature=temperature),
        )
        for metric, temperature in (("sqeuclidean", 1.0), ("euclidean", 1.0), ("cosine", 0.5), ("dot", 2.0))
    ),
    classifying("prototype_logits"),
    classifying("prototype_logits", temperature=2.0, mask=MASK),
    classifying("prototype_loss"),
    classifying("prototype_loss", temperature=2.0, mask=MASK),
    classifying("prototype_loss", query_mask=QUERY_MASK),
    classifying("attention_classify"),
    classifying("attention_classify", temperature=0.5, mask=MASK),
    # Sizes that fill the kernels' tiles and leave a remainder of every kind.
    *(
        OpCase(
            f"pairwise_distance-{queries}x{points}x{dim}",
            ((2, queries, dim), (2, points, dim)),
            _distance(ops.pairwise_distance, metric="sqeuclidean", temperature=temperature),
            _distance(reference.pairwise_distance, metric="sqeuclidean", temperature=temperature),
        )
        # Distances in the thousands would leave nothing of float32 in the sine that derivatives are taken of.
        for queries, points, dim, temperature in (
            *((23, 5, 83, 1.0), (4, 9, 64, 1.0), (1, 1, 1, 1.0)),
            *((7, 3, 1100, 1100.0), (13, 40, 150, 150.0)),
        )
    ),
    *(
        OpCase(
            f"ridge_head-{name}",
            ((2, samples, dim), (2, 2, dim), ()),
            _ridge(ops.ridge_head, samples, mask),
            _ridge(reference.ridge_head, samples, mask),
            1e-10,
        )
        for name, samples, dim, mask in (
            ("primal", 5, 3, None),
            ("primal-masked", 5, 3, MASK),
            ("dual", 3, 5, None),
            ("dual-masked", 3, 5, MASK),
            ("dual-wide", 5, 83, MASK),
        )
    ),
    OpCase(
        "ridge_head-regression",
        ((2, 4, 3), (2, 4, 2), (2, 2, 3)),
        _regression(ops.ridge_head),
        _regression(reference.ridge_head),
    ),
]
# Differentiable once. C decides how many bounds hold α; the diagonal of 1 is that of MetaOptNet's code.
FIRST_ORDER_CASES = [
    OpCase(
        f"svm_head-{name}",
        ((2, 5, dim), (2, 2, dim)),
        _svm(ops.svm_head, mask, **options),
        _svm(reference.svm_head, mask, **options),
        1e-9,
    )
    for name, dim, mask, options in (
        ("all_bounded", 3, None, {"C": 0.01}),
        ("some_bounded", 3, None, {"C": 0.3}),
        ("large_C", 6, None, {"C": 10.0}),
        ("masked", 6, MASK, {"C": 0.3}),
        ("diagonal", 3, MASK, {"C": 0.3, "diagonal": 1.0}),
    )
]


def unrolled(steps: int, coordinates: int, hidden: int, p: float = 0.5, **averaging: int) -> OpCase:
    """coordinate_lstm of gradients, state and weights; where p is 0.5, gradients are on either side of its threshold.
    The coordinates of a task take the place of tasks."""

    def bound(function: Callable[..., Tensors]) -> Callable[..., Tensors]:
        return lambda *tensors: function(*tensors, p=p, **averaging)

    shapes = (
        *((steps, coordinates), (4, hidden, coordinates)),
        *((4 * hidden, hidden + 3), (4 * hidden, 2 * hidden + 1), (hidden + 1,)),
    )
    variant = "-".join(f"{key}={value}" for key, value in averaging.items())
    name = f"coordinate_lstm-{steps}x{coordinates}x{hidden}-{variant}".rstrip("-")
    return OpCase(name, shapes, bound(ops.coordinate_lstm), bound(reference.coordinate_lstm))


# Sizes that fill a block of coordinates and leave a remainder, and more than one range that threads share.
UNROLLED_CASES = [
    unrolled(3, 2, 2),
    unrolled(1, 5, 1),
    unrolled(4, 37, 20, p=10.0),
    unrolled(1, 300, 20),
    unrolled(20, 600, 5),
    unrolled(3, 4, 2, averaged=1, tasks=2),
]
# The cases whose every derivative is cheap enough to be taken element by element.
SMALL_CASES = [case for case in CASES if all(torch.Size(shape).numel() <= 30 for shape in case.shapes)]

# Calls of the raw overloads, for opcheck: op name, arguments.
T, Q, N, S, D = 2, 3, 2, 5, 4


def raw_calls(device: str = "cpu") -> dict[str, tuple[object, ...]]:
    def random(*shape: int) -> Tensor:
        g = torch.Generator().manual_seed(len(shape))
        return torch.randn(shape, generator=g, dtype=torch.float64).to(device).requires_grad_()

    rows = random(T, S, D).detach()
    gram = rows @ rows.mT + torch.eye(S, dtype=torch.float64, device=device)
    labels, weights = LABELS.to(device), torch.rand(T, 3, dtype=torch.float64, device=device)
    return {
        "inner_update": ([random(T, 3), random(T)], [random(T, 3), random(T)], [random(T, 3), random()]),
        "prototypes": (random(T, S, D), labels, 3),
        "prototypes_backward": (random(T, 3, D), weights, labels),
        "class_logsumexp": (random(T, Q, S), labels, 3),
        "prototype_logits": (random(T, S, D), labels, random(T, Q, D), 3, 0.5),
        "prototype_loss": (random(T, S, D), labels, random(T, Q, D), QUERY_LABELS.to(device), 3, 0.5),
        "prototype_logits_backward": (
            *(random(T, Q, 3).detach(), random(T).detach(), labels),
            *(random(T, Q, D).detach(), random(T, 3, D).detach(), weights, 0.5),
        ),
        "squared_distances": (random(T, Q, D), random(T, N, D)),
        "squared_distances_backward": (random(T, Q, N), random(T, Q, D), random(T, N, D)),
        "inner_products": (random(T, Q, D), random(T, N, D), True),
        "gram_matrix": (random(T, S, D),),
        "combine_rows": (random(T, Q, N), random(T, N, D)),
        "solve_positive_definite": (gram.clone().requires_grad_(), random(T, S, N)),
        "coordinate_lstm": (random(3, Q), random(4, 2, Q), random(8, 5), random(8, 5), random(3), 0.5),
        "coordinate_lstm_backward": (
            *(random(3, Q).detach(), random(4, 2, Q).detach(), random(3, Q).detach(), random(4, 2, Q).detach()),
            *(random(8, 5).detach(), random(8, 5).detach(), random(3).detach(), 0.5, True),
        ),
        "svm_weights": (random(T, S, D), labels, 3, 0.1, 50, 1e-10, 0.0),
        "svm_kkt_solve": (
            random(T, S, 3).detach(),
            gram,
            torch.ones(T, S, 3, dtype=torch.float64, device=device),
            labels,
        ),
    }


_X, _Q, _P = torch.ones(2, 5, 3), torch.ones(2, 3, 4), torch.ones(2, 2, 4)

# What a raw overload refuses: op name, arguments, what the error says.
RAW_ERRORS: dict[str, tuple[str, tuple[object, ...], str]] = {
    "label out of range": ("prototypes", (_X, LABELS, 2), "labels holds 2 in task 0, expected 0 to 1"),
    "labels too few": ("prototypes", (_X, LABELS[:, :2], 3), "labels has size 2 in dimension 1, expected 5"),
    "weights too few": ("prototypes_backward", (torch.ones(2, 3, 3), torch.ones(2, 2), LABELS), "weights has size 2"),
    "points of another dimension": ("squared_distances", (_Q, _P[..., :2]), "points has size 2 in dimension 2"),
    "gradient too small": ("squared_distances_backward", (_Q[:, :1, :2], _Q, _P), "gradient has size 1 in dimension 1"),
    "temperature zero": ("prototype_loss", (_X, LABELS, _X, LABELS, 3, 0.0), "temperature must be positive"),
    "query labels too few": ("prototype_loss", (_X, LABELS, _X, LABELS[:, :2], 3, 1.0), "query_labels has size 2"),
    "queries of another dimension": ("prototype_logits", (_X, LABELS, _Q, 3, 1.0), "queries has size 4 in dimension 2"),
    "labels for other scores": ("class_logsumexp", (_X, LABELS, 3), "labels has size 5 in dimension 1, expected 3"),
    "scale too short": (
        "prototype_logits_backward",
        (torch.ones(2, 5, 3), torch.ones(1), LABELS, _X, torch.ones(2, 3, 3), torch.ones(2, 3), 1.0),
        "scale has size 1 in dimension 0, expected 2",
    ),
    "gradients too few": ("inner_update", ([_X, _X], [_X], [_X]), "the same number of tensors"),
    "gradient of another shape": ("inner_update", ([_X], [_X[0]], [_X]), "grads must have the shapes of params"),
    "rate of another shape": ("inner_update", ([_X], [_X], [_X[0]]), "lrs must have one element, or the shapes"),
}
OF_LABEL_VALUES = {"label out of range"}  # which the CPU's kernels alone look at


def assert_agrees(case: OpCase, dtype: torch.dtype, device: str = "cpu") -> None:
    """The op's values are its twin's in float64, as near as the dtype allows."""
    inputs = case.inputs(dtype, device)
    tolerance = case.accuracy if dtype == torch.float64 else 1e-5
    outputs, expected = as_tuple(case.op(*inputs)), as_tuple(case.twin(*(x.double() for x in inputs)))
    for actual, wanted in zip(outputs, expected, strict=True):
        assert actual.dtype == dtype
        torch.testing.assert_close(actual.double(), wanted, rtol=tolerance, atol=tolerance)


def compare(case: OpCase, device: str = "cpu") -> None:
    """A case's values and first derivatives with its twin's, in both dtypes."""
    for dtype in (torch.float64, torch.float32):
        assert_agrees(case, dtype, device)
        leaves = [tensor.requires_grad_() for tensor in case.inputs(dtype, device)]
        gradients = [
            torch.autograd.grad([out.sin().sum() for out in as_tuple(function(*leaves))], leaves)
            for function in (case.op, case.twin)
        ]
        tolerance = 100 * case.accuracy if dtype == torch.float64 else 1e-3
        torch.testing.assert_close(*gradients, rtol=tolerance, atol=tolerance)


def main(device: str = "cpu") -> None:
    for case in (*CASES, *FIRST_ORDER_CASES, *UNROLLED_CASES):
        compare(case, device)
    print(torch.ops.innerloop.instruction_set())


if __name__ == "__main__":
    main(*sys.argv[1:])
