"""Attention over the support set."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import innerloop._library  # noqa: F401 (defines the ops)
from innerloop.ops._differentiable import Arguments, differentiable
from innerloop.ops.checks import check_every_class, check_positive, check_same_space, checked_labels, has_kernel
from innerloop.ops.pairwise_distance import unit_vectors


def attention_classify(
    queries: Tensor,
    support: Tensor,
    labels: Tensor,
    num_classes: int,
    *,
    temperature: float = 1.0,
    mask: Tensor | None = None,
) -> Tensor:
    """Log-probabilities by attention over the support set (Vinyals et al. 2016, equations 1 and 2).

    A softmax over cosine similarities, over the temperature, is how much attention a query pays to each support sample;
    a class has the probability of its samples together. The sum is by logsumexp, so that the logarithm is finite
    however little attention a class receives. A vector of zeros has the similarity 0 to every other. Differentiable in
    queries and support to any order.

    Args:
        queries: [T, Q, D] float32 or float64. support: [T, S, D], the same dtype.
        labels: [T, S] int64, 0 … num_classes-1, in any order; classes may have different numbers of samples.
        num_classes: N.
        temperature: of the softmax; the paper's is 1.
        mask: [T, S] bool, False where a support sample is padding and receives no attention. None: all do.

    Returns: [T, Q, N].

    Raises:
        TypeError, ValueError: a dtype, shape or device that does not fit, a temperature that is not positive, a label
            out of range, or a class without a sample; the message names the argument, the task and the class. Under
            torch.compile and under torch.func.vmap over labels no value can be looked at: there a class without a
            sample has the log-probability −∞.

    Examples:
        >>> support, queries = torch.eye(2)[None], torch.tensor([[[3.0, 3.0]]])  # as near to one as to the other
        >>> innerloop.ops.attention_classify(queries, support, torch.tensor([[0, 1]]), num_classes=2).exp()
        tensor([[[0.5000, 0.5000]]])
    """
    check_same_space(queries, support, "support", "[T, S, D]")
    check_positive(temperature, "temperature")
    labels = checked_labels(labels, "labels", support, "support", "[T, S]", num_classes, mask)
    check_every_class(labels, "labels", num_classes)
    if mask is not None:
        support = torch.where(mask[..., None], support, 0)
    similarity = unit_vectors(queries)[0] @ unit_vectors(support)[0].mT / temperature  # [T, Q, S]
    sums = _class_sums if has_kernel("class_logsumexp", queries) else _twin
    return sums(similarity, labels, num_classes).log_softmax(2)


def _fake(scores: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    return scores.new_empty(*scores.shape[:2], num_classes)


def _setup(ctx: Any, arguments: Arguments, output: Tensor) -> None:
    scores, labels, ctx.num_classes = arguments
    ctx.save_for_backward(scores, labels, output)
    ctx.save_for_forward(scores, labels)


def _shares(scores: Tensor, labels: Tensor, sums: Tensor) -> tuple[Tensor, Tensor]:
    """Each sample's share in its class's sum, [T, Q, S], and the class, of the same shape."""
    classes = labels.clamp(min=0)[:, None].expand_as(scores)
    below = torch.where((labels >= 0)[:, None], scores - sums.gather(2, classes), -torch.inf)
    return below.exp(), classes


def _backward(ctx: Any, gradient: Tensor) -> Arguments:
    shares, classes = _shares(*ctx.saved_tensors)
    return gradient.gather(2, classes) * shares, None, None


def _jvp(ctx: Any, tangent: Tensor, *_: Any) -> Tensor:
    scores, labels, *_ = ctx.saved_tensors
    sums = _class_sums(scores, labels, ctx.num_classes)
    shares, classes = _shares(scores, labels, sums)
    return torch.zeros_like(sums).scatter_add(2, classes, shares * tangent)


def _twin(scores: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    members = labels[:, None] == torch.arange(num_classes, device=labels.device)[:, None]  # [T, N, S]
    return scores[:, :, None].masked_fill(~members[:, None], -torch.inf).logsumexp(3)


#: (scores [T, Q, S], labels [T, S], num_classes) → log Σ exp(scores) over the samples of each class, [T, Q, N].
_class_sums = differentiable(
    "class_logsumexp", fake=_fake, setup_context=_setup, backward=_backward, jvp=_jvp, twin=_twin
)
