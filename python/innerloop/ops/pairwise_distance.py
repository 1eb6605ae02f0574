"""Distances between the queries and the prototypes of each task."""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch.nn.functional as F
from torch import Tensor

import innerloop._library  # noqa: F401 (defines the ops)
from innerloop import reference
from innerloop.ops._differentiable import Arguments, differentiable
from innerloop.ops.checks import check_dims, check_float, check_kernel, check_like
from innerloop.registry import nearest

Metric = Literal["sqeuclidean", "cosine", "dot"]


def pairwise_distance(queries: Tensor, prototypes: Tensor, metric: Metric = "sqeuclidean") -> Tensor:
    """How far each query is from each prototype of its task; smaller is closer in every metric.

    Differentiable to any order. No [T, Q, N, D] tensor is made, but by torch.compile over a torch.func transform.

    Args:
        queries: [T, Q, D] float32 or float64. prototypes: [T, N, D], the same dtype.
        metric: "sqeuclidean", ‖q − p‖², which is 0 exactly for identical points and never negative (Snell et al. 2017);
            "cosine", 1 − q·p / (‖q‖ ‖p‖) (Vinyals et al. 2016); "dot", −q·p.

    Returns: [T, Q, N].

    Raises:
        TypeError, ValueError: dtypes, shapes or devices that do not fit together, or an unknown metric.
    """
    check_float(queries, "queries")
    check_dims(queries, "queries", "[T, Q, D]")
    check_float(prototypes, "prototypes")
    check_dims(prototypes, "prototypes", "[T, N, D]")
    check_like(prototypes, "prototypes", queries, "queries")
    if prototypes.shape[0] != queries.shape[0] or prototypes.shape[2] != queries.shape[2]:
        raise ValueError(
            f"prototypes has shape {tuple(prototypes.shape)}, "
            f"expected [T, N, D] with T = {queries.shape[0]} and D = {queries.shape[2]} as queries has"
        )
    if metric == "sqeuclidean":
        check_kernel("squared_distances", queries, "queries")
        distances: Tensor = _distances(queries, prototypes)
        return distances
    if metric == "cosine":
        return 1 - F.normalize(queries, dim=2) @ F.normalize(prototypes, dim=2).mT
    if metric == "dot":
        return -(queries @ prototypes.mT)
    raise ValueError(f"metric is {metric!r}.{nearest(str(metric), list(get_args(Metric)))}")


def _derivative(queries: Tensor, points: Tensor, along_queries: Tensor, along_points: Tensor) -> Tensor:
    """2 ⟨q − p, q̇ − ṗ⟩ for every pair, [T, Q, N]: the distances' change along (q̇, ṗ), expanded into products."""
    own = (queries * along_queries).sum(2)[:, :, None] + (points * along_points).sum(2)[:, None]
    return 2 * (own - along_queries @ points.mT - queries @ along_points.mT)


def _fake(queries: Tensor, points: Tensor) -> Tensor:
    return queries.new_empty(queries.shape[0], queries.shape[1], points.shape[1])


def _setup(ctx: Any, arguments: Arguments, output: Tensor) -> None:
    ctx.save_for_backward(*arguments)
    ctx.save_for_forward(*arguments)


def _backward(ctx: Any, gradient: Tensor) -> Arguments:
    result: Arguments = _distances_backward(gradient, *ctx.saved_tensors)
    return result


def _jvp(ctx: Any, along_queries: Tensor, along_points: Tensor) -> Tensor:
    queries, points = ctx.saved_tensors
    return _derivative(queries, points, along_queries, along_points)


# The backward B(g, q, p) = 2 (q ∘ Σₙg − g p, p ∘ Σ_q g − gᵀ q) is linear in g and in (q, p), so that its own
# derivatives are itself and _derivative.
def _second_fake(gradient: Tensor, queries: Tensor, points: Tensor) -> tuple[Tensor, Tensor]:
    return queries.new_empty(queries.shape), points.new_empty(points.shape)


def _second_backward(ctx: Any, along_queries: Tensor, along_points: Tensor) -> Arguments:
    gradient, queries, points = ctx.saved_tensors
    for_gradient = _derivative(queries, points, along_queries, along_points)
    return for_gradient, *_distances_backward(gradient, along_queries, along_points)


def _second_jvp(ctx: Any, along_gradient: Tensor, along_queries: Tensor, along_points: Tensor) -> Arguments:
    gradient, queries, points = ctx.saved_tensors
    first = _distances_backward(along_gradient, queries, points)
    second = _distances_backward(gradient, along_queries, along_points)
    return tuple(a + b for a, b in zip(first, second, strict=True))


_distances = differentiable(
    "squared_distances",
    fake=_fake,
    setup_context=_setup,
    backward=_backward,
    jvp=_jvp,
    twin=reference.pairwise_distance,
)
_distances_backward = differentiable(
    "squared_distances_backward", fake=_second_fake, setup_context=_setup, backward=_second_backward, jvp=_second_jvp
)
