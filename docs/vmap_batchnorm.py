"""torch.func differentiates F.batch_norm twice wrongly: a reproduction in plain torch, with central differences.

Three tasks share the weight γ and the bias β of one BatchNorm layer. The scalar is what any meta-learner
differentiates: a function of an inner gradient, here ‖∂loss/∂γ‖², summed over the tasks. Its gradient with respect
to the input x is computed by an autograd loop over the tasks and by torch.func, as grad(vmap(grad(...))), and compared
with central differences of the scalar.

    python docs/vmap_batchnorm.py
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import grad, vmap

torch.set_default_dtype(torch.float64)
torch.manual_seed(0)

TASKS, SAMPLES, CHANNELS = 3, 4, 2
X = torch.randn(TASKS, SAMPLES, CHANNELS, 3, 3)
GAMMA, BETA = torch.rand(CHANNELS) + 0.5, torch.randn(CHANNELS)
TARGET = torch.randn(SAMPLES, CHANNELS, 3, 3)

BatchNorm = Callable[[Tensor, Tensor, Tensor], Tensor]


def library(x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    return F.batch_norm(x, None, None, gamma, beta, training=True, eps=1e-5)


def written_out(x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    var, mean = torch.var_mean(x, (0, 2, 3), correction=0, keepdim=True)
    return (x - mean) * torch.rsqrt(var + 1e-5) * gamma.view(-1, 1, 1) + beta.view(-1, 1, 1)


def loss(batch_norm: BatchNorm, x: Tensor, gamma: Tensor) -> Tensor:
    return (batch_norm(x, gamma, BETA).tanh() * TARGET).sum()


def scalar_by_loop(batch_norm: BatchNorm, x: Tensor) -> Tensor:
    total = torch.zeros(())
    for task in x:
        gamma = GAMMA.clone().requires_grad_()
        (inner,) = torch.autograd.grad(loss(batch_norm, task, gamma), gamma, create_graph=True)
        total = total + (inner**2).sum()
    return total


def scalar_by_func(batch_norm: BatchNorm, x: Tensor) -> Tensor:
    inner = vmap(grad(lambda gamma, task: loss(batch_norm, task, gamma)), (None, 0))(GAMMA, x)
    return (inner**2).sum()


def gradient_by_loop(batch_norm: BatchNorm) -> Tensor:
    x = X.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(scalar_by_loop(batch_norm, x), x)
    return gradient


def central_differences(step: float = 1e-6) -> Tensor:
    """Of the scalar, which is a first-order quantity and the same in every way of computing it."""
    gradient = torch.empty(X.numel())
    for i, direction in enumerate(torch.eye(X.numel())):
        e = step * direction.view_as(X)
        gradient[i] = (scalar_by_loop(library, X + e).detach() - scalar_by_loop(library, X - e).detach()) / (2 * step)
    return gradient.view_as(X)


def main() -> None:
    truth = central_differences()
    print(f"torch {torch.__version__}; relative difference from central differences, and one entry")
    rows = {
        "central differences": truth,
        "autograd loop, F.batch_norm": gradient_by_loop(library),
        "autograd loop, written out": gradient_by_loop(written_out),
        "torch.func,    F.batch_norm": grad(lambda x: scalar_by_func(library, x))(X),
        "torch.func,    written out": grad(lambda x: scalar_by_func(written_out, x))(X),
    }
    for name, gradient in rows.items():
        difference = float((gradient - truth).norm() / truth.norm())
        print(f"  {name:<28} {difference:8.1e} {float(gradient[0, 0, 0, 0, 0]):14.9f}")
    same = [float(scalar(f, X).detach()) for scalar in (scalar_by_loop, scalar_by_func) for f in (library, written_out)]
    print("the scalar itself, four ways:", *(f"{value:.12f}" for value in same))


if __name__ == "__main__":
    main()
