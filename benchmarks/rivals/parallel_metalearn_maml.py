"""parallel-metalearn's MAML, which runs tasks under torch.func.vmap; one call of its step(), outer rate 0."""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from metalearn.algorithms.MAML import MAML
from metalearn.inner_optimizers import InnerSGD
from metalearn.loss import CrossEntropy
from metalearn.loss.base import BaseLoss
from metalearn.loss.categorical_accuracy import CategoricalAccuracy
from metalearn.model_wrappers import MAML_Model
from torch import nn

from innerloop.bench.rivals import Step
from innerloop.bench.rivals.torch_parts import batch, training_model
from innerloop.bench.workloads import Workload


class _Mse(BaseLoss):
    def forward(self, out_dict, targets, model_states=None, **kwargs):
        loss = F.mse_loss(out_dict["logits"], targets["labels"])
        return loss, loss


class _IgnoreKeywords(nn.Module):
    """It calls its parts with keywords such as training=."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x, **kwargs):
        return self.module(x)


def make(workload: Workload, dtype: str) -> Step:
    # Its own BatchNorm is elementary and right, but its translator of torch models raises on a BatchNorm layer
    # (0.5.6: an unexpected argument learn_gamma), so a torch model runs as it is.
    net = training_model(workload, dtype)
    assert isinstance(net, nn.Sequential)
    model = MAML_Model(
        _IgnoreKeywords(net[:-1]),
        _IgnoreKeywords(net[-1]),
        fast_weights_names="ANIL" if workload.adapt == "head" else None,
    )
    inner_optimizer = InnerSGD(
        model.get_fast_weights(),
        first_order=workload.first_order,
        max_inner_steps=workload.steps,
        learn_lr=False,
    ).to(getattr(torch, dtype))
    inner_optimizer.lrs["lr_global"].data.fill_(workload.inner_lr)  # after the cast: exact in float64
    maml = MAML(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.0),
        inner_optimizer=inner_optimizer,
        support_loss_fn=CrossEntropy(CategoricalAccuracy()) if workload.loss == "cross_entropy" else _Mse(),
        inner_steps=workload.steps,
    )
    support_x, support_y, query_x, query_y = batch(workload, dtype)
    batches = itertools.repeat((support_x, {"labels": support_y}, query_x, {"labels": query_y}))

    def step():
        loss, _ = maml.step(batches)
        return loss, [parameter.grad for parameter in model.parameters()]

    return step
