"""What the rivals written in torch share: the model as they want it, the tasks, the loss."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from innerloop.bench.workloads import Workload, make_arrays, make_model

Task = tuple[Tensor, Tensor, Tensor, Tensor]


def training_model(workload: Workload, dtype: str) -> nn.Module:
    """The net in train mode. Its BatchNorm keeps no running statistics: vmap cannot write them, nobody reads them."""
    return torch.func.replace_all_batch_norm_modules_(make_model(workload, dtype))


def body_and_learner(model: nn.Module, workload: Workload) -> tuple[nn.Module, nn.Module]:
    """The net in two parts, of which the inner loop adapts the second: all of it, or its last layer."""
    if workload.adapt == "all":
        return nn.Identity(), model
    assert isinstance(model, nn.Sequential)
    return model[:-1], model[-1]


def batch(workload: Workload, dtype: str) -> Task:
    """support_x [T, S, ...], support_y, query_x [T, Q, ...], query_y."""
    support_x, support_y, query_x, query_y = map(torch.from_numpy, make_arrays(workload, dtype))
    return support_x, support_y, query_x, query_y


def tasks(workload: Workload, dtype: str) -> list[Task]:
    """One by one."""
    return list(zip(*batch(workload, dtype), strict=True))


def loss_function(workload: Workload) -> Callable[[Tensor, Tensor], Tensor]:
    return F.cross_entropy if workload.loss == "cross_entropy" else F.mse_loss


class ExactBatchNorm(nn.Module):
    """BatchNorm in elementary operations, through which torch.func is right (F.batch_norm: docs/numerics.md)."""

    def __init__(self, source: nn.BatchNorm2d) -> None:
        super().__init__()
        self.weight, self.bias, self.eps = source.weight, source.bias, source.eps

    def forward(self, x: Tensor) -> Tensor:
        variance, mean = torch.var_mean(x, (0, 2, 3), correction=0, keepdim=True)
        normal = (x - mean) * torch.rsqrt(variance + self.eps)
        return normal * self.weight.view(1, -1, 1, 1) + self.bias.view(1, -1, 1, 1)


def with_exact_batch_norm(model: nn.Module) -> nn.Module:
    for name, child in model.named_children():
        if isinstance(child, nn.BatchNorm2d):
            setattr(model, name, ExactBatchNorm(child))
    return model
