"""Plain-torch twins of the native ops: their specification, and the oracle of their tests."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def prototypes(embeddings: Tensor, labels: Tensor, num_classes: int, mask: Tensor | None = None) -> Tensor:
    """Twin of :func:`innerloop.ops.prototypes`."""
    members = labels[:, None] == torch.arange(num_classes, device=labels.device)[:, None]  # [T, N, S]
    if mask is not None:
        members = members & mask[:, None]
    members = members.to(embeddings.dtype)
    return members @ embeddings / members.sum(2, keepdim=True)


def pairwise_distance(
    queries: Tensor, prototypes: Tensor, metric: str = "sqeuclidean", temperature: float = 1.0
) -> Tensor:
    """Twin of :func:`innerloop.ops.pairwise_distance`; makes the [T, Q, N, D] tensor. Knows no identical points with
    "euclidean", and no zero vectors with "cosine"."""
    q, p = queries[:, :, None], prototypes[:, None]
    if metric == "sqeuclidean":
        distances = ((q - p) ** 2).sum(3)
    elif metric == "euclidean":
        distances = ((q - p) ** 2).sum(3).sqrt()
    elif metric == "cosine":
        distances = 1 - _cosine(q, p)
    else:
        distances = -(q * p).sum(3)
    return distances / temperature


def _cosine(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(3) / (a.norm(dim=3) * b.norm(dim=3))


def prototype_logits(
    support: Tensor,
    labels: Tensor,
    queries: Tensor,
    num_classes: int,
    *,
    metric: str = "sqeuclidean",
    temperature: float = 1.0,
    mask: Tensor | None = None,
) -> Tensor:
    """Twin of :func:`innerloop.ops.prototype_logits`."""
    return -pairwise_distance(queries, prototypes(support, labels, num_classes, mask), metric, temperature)


def prototype_loss(
    support: Tensor,
    labels: Tensor,
    queries: Tensor,
    query_labels: Tensor,
    num_classes: int,
    *,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    query_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Twin of :func:`innerloop.ops.prototype_loss`."""
    logits = prototype_logits(support, labels, queries, num_classes, temperature=temperature, mask=mask)
    valid = query_labels >= 0 if query_mask is None else query_mask
    chosen = query_labels[..., None] == torch.arange(num_classes, device=labels.device)
    losses = -(logits.log_softmax(2) * chosen).sum(2)
    return (losses * valid).sum(1) / valid.sum(1), logits.detach()


def attention_classify(
    queries: Tensor,
    support: Tensor,
    labels: Tensor,
    num_classes: int,
    *,
    temperature: float = 1.0,
    mask: Tensor | None = None,
) -> Tensor:
    """Twin of :func:`innerloop.ops.attention_classify`; makes the [T, Q, S, D] tensor, and takes a logarithm of what
    may have been rounded to 0. Knows no zero vectors."""
    similarity = _cosine(queries[:, :, None], support[:, None]) / temperature
    if mask is not None:
        similarity = similarity.masked_fill(~mask[:, None], -torch.inf)
    members = labels[..., None] == torch.arange(num_classes, device=labels.device)  # [T, S, N]
    return (similarity.softmax(2) @ members.to(queries.dtype)).log()


def inner_update(params: list[Tensor], grads: list[Tensor], lr: list[Tensor]) -> list[Tensor]:
    """Twin of :func:`innerloop.ops.inner_update`."""
    return [param - rate * grad for param, grad, rate in zip(params, grads, lr, strict=True)]


def ridge_head(
    support: Tensor,
    labels: Tensor,
    queries: Tensor,
    num_classes: int,
    regularization: float | Tensor = 1.0,
    mask: Tensor | None = None,
) -> Tensor:
    """Twin of :func:`innerloop.ops.ridge_head`, in the primal form whatever the sizes."""
    targets = labels if labels.is_floating_point() else one_hot(labels, num_classes, support.dtype)
    if mask is not None:
        support, targets = torch.where(mask[..., None], support, 0), torch.where(mask[..., None], targets, 0)
    eye = torch.eye(support.shape[2], dtype=support.dtype, device=support.device)
    system = support.mT @ support + regularization * eye
    return queries @ solve_positive_definite(system, support.mT @ targets)


def solve_positive_definite(matrix: Tensor, right: Tensor) -> Tensor:
    """matrix⁻¹ right. Not torch.linalg.solve, whose derivative by torch.func's grad of jvp is wrong (torch 2.13)."""
    return torch.cholesky_solve(right, torch.linalg.cholesky(matrix))


def svm_head(
    support: Tensor,
    labels: Tensor,
    queries: Tensor,
    num_classes: int,
    C: float = 0.1,
    diagonal: float = 0.0,
    mask: Tensor | None = None,
) -> Tensor:
    """Twin of :func:`innerloop.ops.svm_head`."""
    if mask is not None:
        support, labels = torch.where(mask[..., None], support, 0), torch.where(mask, labels, -1)
    return queries @ support.mT @ svm_dual(svm_gram(support, diagonal), labels, num_classes, C)


def svm_gram(support: Tensor, diagonal: float = 0.0) -> Tensor:
    return support @ support.mT + diagonal * torch.eye(support.shape[1], dtype=support.dtype, device=support.device)


def svm_dual(gram: Tensor, labels: Tensor, num_classes: int, C: float, iterations: int = 40) -> Tensor:
    """α of :func:`innerloop.ops.svm_solve`, float64, from the Gram matrices [T, S, S] and labels, -1 for a sample that
    is not there: a dense interior-point method, and one more Newton step for the derivative."""
    there = (labels >= 0)[..., None]
    gram = torch.where(there & there.mT, gram, 0)
    target = one_hot(labels.clamp(min=0), num_classes, gram.dtype)
    with torch.no_grad():
        dual = (target - 1 / num_classes) * (1 / (2 + gram.diagonal(dim1=1, dim2=2).amax(1)))[:, None, None]
        slack = target - dual  # of α/C
        multiplier, shift = torch.ones_like(dual), torch.zeros_like(dual[..., :1])
        for _ in range(iterations):
            gradient = C * gram @ dual - target + multiplier + shift
            relaxed = 0.1 * (slack * multiplier).mean((1, 2), keepdim=True) / slack
            step, shift_step = _kkt_step(C * gram, multiplier / slack, -gradient + multiplier - relaxed)
            multiplier_step = relaxed - multiplier + multiplier / slack * step
            growth = torch.maximum(step / slack, -multiplier_step / multiplier).amax((1, 2), keepdim=True)
            length = (0.95 / growth.clamp(min=1e-9)).clamp(max=1)
            dual, slack = dual + length * step, slack - length * step
            multiplier, shift = multiplier + length * multiplier_step, shift + length * shift_step
    gradient = C * gram @ dual - target + multiplier + shift
    step, _ = _kkt_step(C * gram, multiplier / slack, -gradient)
    return torch.where(there, C * (dual + step), 0)


def _kkt_step(gram: Tensor, curvature: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """(δ [T, S, N], ν [T, S, 1]) with (K + curvature) δ + ν = right and Σₖ δ = 0, as one dense system."""
    tasks, samples, classes = right.shape
    of_samples, of_classes = (torch.eye(n, dtype=gram.dtype, device=gram.device) for n in (samples, classes))
    within = torch.einsum("tij,kl->tikjl", gram, of_classes).flatten(3).flatten(1, 2)
    sums = of_samples.repeat_interleave(classes, 1).expand(tasks, -1, -1)
    system = torch.cat(
        [
            torch.cat([within + torch.diag_embed(curvature.flatten(1)), sums.mT], 2),
            torch.cat([sums, gram.new_zeros(tasks, samples, samples)], 2),
        ],
        1,
    )
    sides = torch.cat([right.flatten(1), gram.new_zeros(tasks, samples)], 1)
    solution = torch.linalg.solve(system, sides)
    return solution[:, : samples * classes].reshape(right.shape), solution[:, samples * classes :, None]


def svm_objectives(gram: Tensor, labels: Tensor, dual: Tensor, C: float) -> tuple[Tensor, Tensor]:
    """(primal, dual) objectives [T] of the support vector machine, to be minimised and maximised."""
    target = one_hot(labels, dual.shape[2], dual.dtype)
    scores = gram @ dual
    squares = (dual * scores).sum((1, 2)) / 2
    margins = scores - target
    losses = margins.amax(2) - (margins * target).sum(2)
    return squares + C * (losses * (labels >= 0)).sum(1), (dual * target).sum((1, 2)) - squares


def one_hot(labels: Tensor, num_classes: int, dtype: torch.dtype) -> Tensor:
    """[..., N]; zeros for a label of -1."""
    return (labels[..., None] == torch.arange(num_classes, device=labels.device)).to(dtype)


def coordinate_lstm(
    gradients: Tensor,
    state: Tensor,
    first: Tensor,
    second: Tensor,
    output: Tensor,
    p: float = 10.0,
    averaged: int = 0,
    tasks: int = 1,
) -> tuple[Tensor, Tensor]:
    """Twin of :func:`innerloop.ops.coordinate_lstm`."""
    h1, c1, h2, c2 = state
    updates = []
    for gradient in gradients:
        h1, c1 = _lstm_cell(first, log_and_sign(gradient, p), h1, c1)
        h1 = _averaged(h1, averaged, tasks)
        h2, c2 = _lstm_cell(second, h1, h2, c2)
        h2 = _averaged(h2, averaged, tasks)
        updates.append(output[:-1] @ h2 + output[-1])
    return torch.stack(updates) if updates else gradients.clone(), torch.stack((h1, c1, h2, c2))


def log_and_sign(gradient: Tensor, p: float) -> Tensor:
    """Gradients [C] as the learned optimizer sees them, [2, C] (Andrychowicz et al. 2016, appendix A)."""
    large = gradient.abs() >= math.exp(-p)
    size = torch.where(large, gradient, 1).abs().log() / p
    return torch.stack((torch.where(large, size, -1), torch.where(large, gradient.sign(), math.exp(p) * gradient)))


def _lstm_cell(weights: Tensor, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """Of columns: x [inputs, C], h and c [H, C]."""
    i, f, g, o = (weights @ torch.cat((x, h, torch.ones_like(h[:1])))).chunk(4)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


def _averaged(h: Tensor, count: int, tasks: int) -> Tensor:
    """The first rows of h [H, C] replaced by their means over the coordinates of each task."""
    if count == 0:
        return h
    own = h[:count].unflatten(1, (tasks, -1))
    return torch.cat((own.mean(2, keepdim=True).expand_as(own).flatten(1), h[count:]))
