"""Distances between the queries and the prototypes of each task."""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import Tensor

import innerloop._library  # noqa: F401 (defines the ops)
from innerloop import reference
from innerloop.ops._differentiable import Arguments, differentiable
from innerloop.ops.checks import check_kernel, check_positive, check_same_space, has_kernel
from innerloop.registry import check_choice

Metric = Literal["sqeuclidean", "euclidean", "cosine", "dot"]


def pairwise_distance(
    queries: Tensor, prototypes: Tensor, metric: Metric = "sqeuclidean", temperature: float = 1.0
) -> Tensor:
    """How far each query is from each prototype of its task; smaller is closer in every metric.

    Differentiable to any order. No [T, Q, N, D] tensor is made, but by torch.compile over a torch.func transform.

    Args:
        queries: [T, Q, D] float32 or float64. prototypes: [T, N, D], the same dtype.
        metric: "sqeuclidean", ‖q − p‖² (Snell et al. 2017); "euclidean", its root, whose derivatives of every order
            are 0 where q = p; "cosine", 1 − q·p / (‖q‖ ‖p‖) (Vinyals et al. 2016), 1 with zero derivatives for a vector
            of zeros; "dot", −q·p. But for "dot", none is negative, and that of identical points (no zero vectors, for
            "cosine") is 0 exactly.
        temperature: the distances are divided by it.

    Returns: [T, Q, N].

    Raises:
        TypeError, ValueError: dtypes, shapes or devices that do not fit together, an unknown metric, or a temperature
            that is not positive.

    Examples:
        >>> queries, prototypes = torch.tensor([[[0.0, 3.0]]]), torch.tensor([[[0.0, 3.0], [4.0, 0.0]]])
        >>> innerloop.ops.pairwise_distance(queries, prototypes)
        tensor([[[ 0., 25.]]])
        >>> innerloop.ops.pairwise_distance(queries, prototypes, "cosine")
        tensor([[[0., 1.]]])
    """
    check_same_space(queries, prototypes, "prototypes", "[T, N, D]")
    check_positive(temperature, "temperature")
    check_choice(metric, "metric", get_args(Metric))
    if metric == "dot":
        return queries @ prototypes.mT / -temperature
    if metric == "cosine":
        queries, no_query = unit_vectors(queries)
        prototypes, no_prototype = unit_vectors(prototypes)
        if not has_kernel("squared_distances", queries):
            return (1 - queries @ prototypes.mT) / temperature
        # Half the squared distance of the unit vectors, which is exact where 1 − q·p is lost in rounding
        return (squared_distances(queries, prototypes) + (no_query + no_prototype.mT)) / (2 * temperature)
    check_kernel("squared_distances", queries, "queries")
    distances: Tensor = squared_distances(queries, prototypes)
    if metric == "euclidean":
        same = distances == 0
        distances = torch.where(same, 0, torch.where(same, 1, distances).sqrt())
    return distances / temperature if temperature != 1 else distances


def unit_vectors(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [..., D] over its norms, 0 with zero derivatives where x is 0; and 1 there, [..., 1], 0 elsewhere."""
    squares = (x * x).sum(-1, keepdim=True)
    zero = squares == 0
    return x * torch.where(zero, 0, torch.where(zero, 1, squares).rsqrt()), zero.to(x.dtype)


def derivative(queries: Tensor, points: Tensor, along_queries: Tensor, along_points: Tensor) -> Tensor:
    """2 ⟨q − p, q̇ − ṗ⟩ for every pair, [T, Q, N]: the distances' change along (q̇, ṗ), expanded into products."""
    own = (queries * along_queries).sum(2)[:, :, None] + (points * along_points).sum(2)[:, None]
    return 2 * (own - along_queries @ points.mT - queries @ along_points.mT)


def _fake(queries: Tensor, points: Tensor) -> Tensor:
    return queries.new_empty(queries.shape[0], queries.shape[1], points.shape[1])


def _setup(ctx: Any, arguments: Arguments, output: Tensor) -> None:
    ctx.save_for_backward(*arguments)
    ctx.save_for_forward(*arguments)


def _backward(ctx: Any, gradient: Tensor) -> Arguments:
    result: Arguments = squared_distances_backward(gradient, *ctx.saved_tensors)
    return result


def _jvp(ctx: Any, along_queries: Tensor, along_points: Tensor) -> Tensor:
    queries, points = ctx.saved_tensors
    return derivative(queries, points, along_queries, along_points)


# The backward B(g, q, p) = 2 (q ∘ Σₙg − g p, p ∘ Σ_q g − gᵀ q) is linear in g and in (q, p), so that its own
# derivatives are itself and _derivative.
def _second_fake(gradient: Tensor, queries: Tensor, points: Tensor) -> tuple[Tensor, Tensor]:
    return queries.new_empty(queries.shape), points.new_empty(points.shape)


def _second_backward(ctx: Any, along_queries: Tensor, along_points: Tensor) -> Arguments:
    gradient, queries, points = ctx.saved_tensors
    for_gradient = derivative(queries, points, along_queries, along_points)
    return for_gradient, *squared_distances_backward(gradient, along_queries, along_points)


def _second_jvp(ctx: Any, along_gradient: Tensor, along_queries: Tensor, along_points: Tensor) -> Arguments:
    gradient, queries, points = ctx.saved_tensors
    first = squared_distances_backward(along_gradient, queries, points)
    second = squared_distances_backward(gradient, along_queries, along_points)
    return tuple(a + b for a, b in zip(first, second, strict=True))


#: (queries, points) → [T, Q, N], and its backward: (gradient [T, Q, N], queries, points) → their gradients.
squared_distances = differentiable(
    "squared_distances",
    fake=_fake,
    setup_context=_setup,
    backward=_backward,
    jvp=_jvp,
    twin=reference.pairwise_distance,
)
squared_distances_backward = differentiable(
    "squared_distances_backward", fake=_second_fake, setup_context=_setup, backward=_second_backward, jvp=_second_jvp
)
