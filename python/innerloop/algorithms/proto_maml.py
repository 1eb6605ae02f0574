"""Proto-MAML."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from innerloop import engine as engines
from innerloop.algorithms.maml import MAML
from innerloop.contract import Result
from innerloop.functional import FunctionalModel, head_parameters, head_path
from innerloop.ops import prototypes
from innerloop.tasks import TaskBatch


class ProtoMAML(MAML):
    """Proto-MAML: MAML that starts each task's head from the prototypes of its classes (Triantafillou et al. 2020).

    With μ_c the mean embedding of class c of the support set, the head starts with weight 2μ_c and bias −‖μ_c‖²
    (section 3 of the paper): before any step it is the prototypical network's classifier. The meta-gradient goes
    through the prototypes. The head that the model brings is never used; the options are MAML's.

    The model's last module with parameters must be an nn.Linear with a bias, whose output is the model's; what is
    learned are the parameters before it.
    """

    def adapted(self) -> None:
        """All parameters, the head's among them."""
        head = self.model.get_submodule(head_path(self.model))
        if not isinstance(head, nn.Linear) or head.bias is None:
            raise ValueError(f"model ends in {type(head).__name__}, expected an nn.Linear with a bias as its head")
        if len(list(self.model.parameters())) == len(list(head.parameters())):
            raise ValueError(
                "model has no parameters but its head's, which prototypes take the place of: expected an encoder with "
                "parameters in front of the head"
            )

    def initial_parameters(self, tasks: TaskBatch) -> dict[str, Tensor]:
        """θ₀ by name: the model's own, and a head [T, ...] for each task."""
        weight, bias = head_parameters(self.model)
        ways = self.model.get_parameter(weight).shape[0]
        if tasks.ways != ways:
            raise ValueError(f"tasks has {tasks.ways} ways, but the model's head has {ways} outputs: make them equal")
        parameters: dict[str, Tensor] = dict(self.model.named_parameters())
        body = FunctionalModel(self.model, self.bn)
        body.module.set_submodule(head_path(self.model), nn.Identity())
        centres = torch.cat([_prototypes(body, parameters, task, ways) for task in tasks])  # [T, N, D]
        return parameters | {weight: 2 * centres, bias: -(centres**2).sum(2)}

    def forward(self, tasks: TaskBatch) -> Result:
        inner = self.inner_loop(classification=True)
        return engines.meta_result(self.model, tasks, inner, self.initial_parameters(tasks), self.engine)

    def adapt(self, support_x: Tensor, support_y: Tensor) -> nn.Module:
        inner = self.inner_loop(classification=True)
        x, y = support_x[None], support_y[None]
        with torch.no_grad():
            initial = self.initial_parameters(TaskBatch(x, y, x, y))
        own = initial | {name: initial[name][0] for name in head_parameters(self.model)}
        adapted = engines.adapt(self.model, support_x, support_y, inner, self.engine, own)
        return FunctionalModel(self.model, inner.bn).as_module(adapted, support_x)


def _prototypes(body: FunctionalModel, parameters: dict[str, Tensor], task: TaskBatch, ways: int) -> Tensor:
    """[1, N, D] of a batch of one task."""
    body.start_task()
    support_x, support_y, mask = task.support_x[0], task.support_y, task.support_mask
    if mask is not None:
        support_x, support_y = support_x[mask[0]], support_y[mask][None]
    return prototypes(body.support(parameters, support_x)[None], support_y, ways)
