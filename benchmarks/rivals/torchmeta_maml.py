"""torchmeta's MetaModules and gradient_update_parameters, used as its MAML example does."""

from __future__ import annotations

from torch import nn

from innerloop.bench.rivals import Step
from innerloop.bench.rivals.torch_parts import body_and_learner, loss_function, tasks, training_model
from innerloop.bench.workloads import Workload
from rivals.importing import skip_umbrella

skip_umbrella("torchmeta", "torchmeta.utils")  # before its parts are imported, hence E402 below

from torchmeta.modules import MetaBatchNorm2d, MetaConv2d, MetaLinear, MetaSequential  # noqa: E402
from torchmeta.utils.gradient_based import gradient_update_parameters  # noqa: E402

_META = {nn.Conv2d: MetaConv2d, nn.BatchNorm2d: MetaBatchNorm2d, nn.Linear: MetaLinear}


def _to_meta(module: nn.Module) -> nn.Module:
    """A MetaModule is a torch layer with one more argument to its forward: the layer itself, of another class."""
    if isinstance(module, nn.Sequential):
        return MetaSequential(*map(_to_meta, module))
    module.__class__ = _META.get(type(module), type(module))
    return module


def make(workload: Workload, dtype: str) -> Step:
    model = training_model(workload, dtype)
    body, learner = body_and_learner(model, workload)
    learner = _to_meta(learner)
    loss_of = loss_function(workload)
    batch = tasks(workload, dtype)

    def step():
        model.zero_grad()
        total = 0.0
        for support_x, support_y, query_x, query_y in batch:
            adapted = None
            support = body(support_x)
            for _ in range(workload.steps):
                adapted = gradient_update_parameters(
                    learner,
                    loss_of(learner(support, params=adapted), support_y),
                    params=adapted,
                    step_size=workload.inner_lr,
                    first_order=workload.first_order,
                )
            loss = loss_of(learner(body(query_x), params=adapted), query_y) / len(batch)
            loss.backward()
            total += loss.item()
        return total, [parameter.grad for parameter in model.parameters()]

    return step
