"""Attention over the support set."""

from __future__ import annotations

import torch
from torch import Tensor

from innerloop.ops.checks import check_every_class, check_same_space, check_temperature, checked_labels
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
    """
    check_same_space(queries, support, "support", "[T, S, D]")
    check_temperature(temperature)
    labels = checked_labels(labels, "labels", support, "support", "[T, S]", num_classes, mask)
    check_every_class(labels, "labels", num_classes)
    if mask is not None:
        support = torch.where(mask[..., None], support, 0)
    similarity = unit_vectors(queries)[0] @ unit_vectors(support)[0].mT / temperature  # [T, Q, S]
    members = labels[:, None] == torch.arange(num_classes, device=labels.device)[:, None]  # [T, N, S]
    sums = similarity[:, :, None].masked_fill(~members[:, None], -torch.inf).logsumexp(3)
    return sums.log_softmax(2)
