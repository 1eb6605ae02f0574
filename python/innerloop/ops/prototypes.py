"""Class means of the embeddings of a batch of tasks."""

from __future__ import annotations

from typing import Any

from torch import Tensor

import innerloop._library  # noqa: F401 (defines the ops)
from innerloop import reference
from innerloop.ops._differentiable import Arguments, differentiable
from innerloop.ops.checks import check_dims, check_every_class, check_float, check_kernel, checked_labels


def prototypes(embeddings: Tensor, labels: Tensor, num_classes: int, mask: Tensor | None = None) -> Tensor:
    """The mean embedding of each class of each task (Snell et al. 2017, equation 1).

    Differentiable in embeddings to any order.

    Args:
        embeddings: [T, S, D] float32 or float64.
        labels: [T, S] int64, 0 … num_classes-1, in any order; classes may have different numbers of samples.
        num_classes: N.
        mask: [T, S] bool, False where a sample is padding and counts nowhere. None: all count.

    Returns: [T, N, D].

    Raises:
        TypeError, ValueError: a dtype or a shape that does not fit, a label out of range, or a class without a sample;
            the message names the argument, the task and the class. Under torch.compile and under torch.func.vmap over
            labels no value can be looked at: there a class without a sample has the prototype 0.

    Examples:
        >>> embeddings = torch.tensor([[[0.0, 0.0], [4.0, 2.0], [2.0, 0.0]]])
        >>> innerloop.ops.prototypes(embeddings, torch.tensor([[0, 1, 0]]), num_classes=2)
        tensor([[[1., 0.],
                 [4., 2.]]])
    """
    check_float(embeddings, "embeddings")
    check_dims(embeddings, "embeddings", "[T, S, D]")
    check_kernel("prototypes", embeddings, "embeddings")
    labels = checked_labels(labels, "labels", embeddings, "embeddings", "[T, S]", num_classes, mask)
    check_every_class(labels, "labels", num_classes)
    means, _ = class_means(embeddings, labels, num_classes)
    return means


def _fake(embeddings: Tensor, labels: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    tasks, _, dim = embeddings.shape
    return embeddings.new_empty(tasks, num_classes, dim), embeddings.new_empty(tasks, num_classes)


def _setup(ctx: Any, arguments: Arguments, output: tuple[Tensor, Tensor]) -> None:
    _, labels, ctx.num_classes = arguments
    ctx.save_for_backward(output[1], labels)
    ctx.save_for_forward(labels)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, gradient: Tensor, _: Tensor) -> Arguments:
    weights, labels = ctx.saved_tensors
    return class_means_backward(gradient, weights, labels), None, None


def _jvp(ctx: Any, tangent: Tensor, *_: Any) -> tuple[Tensor, None]:
    (labels,) = ctx.saved_tensors
    return class_means(tangent, labels, ctx.num_classes)[0], None


# The transpose of a linear map is linear too: each is the other's backward.
def _transpose_fake(gradient: Tensor, weights: Tensor, labels: Tensor) -> Tensor:
    return gradient.new_empty(*labels.shape, gradient.shape[2])


def _transpose_setup(ctx: Any, arguments: Arguments, output: Tensor) -> None:
    gradient, weights, labels = arguments
    ctx.num_classes = gradient.shape[1]
    ctx.save_for_backward(labels)
    ctx.save_for_forward(weights, labels)


def _transpose_backward(ctx: Any, gradient: Tensor) -> Arguments:
    (labels,) = ctx.saved_tensors
    return class_means(gradient, labels, ctx.num_classes)[0], None, None


def _transpose_jvp(ctx: Any, tangent: Tensor, *_: Any) -> Tensor:
    weights, labels = ctx.saved_tensors
    return class_means_backward(tangent, weights, labels)


def _twin(embeddings: Tensor, labels: Tensor, num_classes: int) -> tuple[Tensor, None]:
    return reference.prototypes(embeddings, labels, num_classes), None


#: (embeddings, labels, num_classes) → (means [T, N, D], 1 / number of samples of each class [T, N]); a label of -1 is
#: no class. Its transpose is class_means_backward (gradient [T, N, D], those weights, labels) → [T, S, D].
class_means = differentiable("prototypes", fake=_fake, setup_context=_setup, backward=_backward, jvp=_jvp, twin=_twin)
class_means_backward = differentiable(
    "prototypes_backward",
    fake=_transpose_fake,
    setup_context=_transpose_setup,
    backward=_transpose_backward,
    jvp=_transpose_jvp,
)
