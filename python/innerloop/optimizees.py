"""What an optimizer optimizes: a model on the support sets of many tasks at once, each with parameters of its own."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from innerloop import engine as engines
from innerloop.contract import Result
from innerloop.inner_loop import BatchNormMode
from innerloop.losses import Loss
from innerloop.native_engine import inner_loop
from innerloop.tasks import TaskBatch


class Optimizees:
    """The support losses of T tasks as functions of θ [T, P], the model's parameters that require grad in a row.

    Args:
        model: any module; none of its parameters or buffers is written. tasks: T tasks.
        bn: "transductive", "support" or "running". loss: "cross_entropy", "mse", a callable, or None: by the targets.
        engine: what computes losses and gradients: "auto", "native" or "torch".
        batch_size: samples of a task's support set that each loss and its gradient are of, drawn anew each time; 0: all
            of them. seed: of what is drawn.
    """

    def __init__(
        self,
        model: nn.Module,
        tasks: TaskBatch,
        bn: BatchNormMode = "transductive",
        loss: Loss | None = None,
        engine: engines.Engine = "auto",
        batch_size: int = 0,
        seed: int = 0,
    ) -> None:
        self.model = model
        self.tasks = tasks
        self.engine = engine
        self.batch_size = batch_size
        self._random = torch.Generator().manual_seed(seed)
        x, y, mask = tasks.support_x, tasks.support_y, tasks.support_mask
        self._support = TaskBatch(x, y, x, y, mask, mask)
        loss = loss or ("cross_entropy" if tasks.is_classification else "mse")
        # An inner loop of no steps: the loss at the parameters that it is given, and its gradient.
        self._inner = inner_loop(model, inner_lr=0.0, inner_steps=0, bn=bn, loss=loss)

    def losses_and_gradients(self, parameters: Tensor) -> tuple[Tensor, Tensor]:
        """Each task's support loss at its θ, [T], and its gradient [T, P]; detached."""
        samples = self.samples()
        with torch.enable_grad():
            leaves = {name: value.detach().requires_grad_() for name, value in by_name(self.model, parameters).items()}
            result = self._run(samples, leaves)
            gradients = torch.autograd.grad(result.loss, list(leaves.values()), materialize_grads=True)
        # The loss is the mean over the tasks.
        return result.task_losses, torch.cat([g.flatten(1) for g in gradients], 1) * self.tasks.num_tasks

    def samples(self) -> TaskBatch:
        """The support sets, and as query sets the samples of each that the next loss is of."""
        if not self.batch_size:
            return self._support
        x, y, mask = self._support.support_x, self._support.support_y, self._support.support_mask
        keys = torch.rand(x.shape[:2], generator=self._random).to(x.device)
        keys = keys if mask is None else keys.masked_fill(~mask, 2)  # padding comes last
        chosen = keys.argsort(1)[:, : self.batch_size]
        rows = torch.arange(len(x), device=x.device)[:, None]
        return TaskBatch(x, y, x[rows, chosen], y[rows, chosen], mask, None if mask is None else mask[rows, chosen])

    @torch.no_grad()
    def query_result(self, parameters: Tensor) -> Result:
        """What the model makes of the query sets with each task's θ."""
        return self._run(self.tasks, by_name(self.model, parameters))

    def _run(self, tasks: TaskBatch, parameters: dict[str, Tensor]) -> Result:
        given = {name: value.detach() for name, value in self.model.named_parameters()} | parameters
        return engines.meta_result(self.model, tasks, self._inner, given, self.engine)


def by_name(model: nn.Module, parameters: Tensor) -> dict[str, Tensor]:
    """θ [..., P] by the names of the model's parameters that require grad, each [..., *shape]."""
    own = {name: value for name, value in model.named_parameters() if value.requires_grad}
    parts = parameters.split([value.numel() for value in own.values()], dim=-1)
    return {
        name: part.unflatten(-1, value.shape) if value.dim() else part.squeeze(-1)
        for (name, value), part in zip(own.items(), parts, strict=True)
    }


def own_parameters(model: nn.Module, tasks: int) -> Tensor:
    """The model's parameters that require grad for each of T tasks, [T, P]."""
    flat = torch.cat([value.detach().flatten() for value in model.parameters() if value.requires_grad])
    return flat.expand(tasks, -1)


def drawn_parameters(model: nn.Module, tasks: int) -> Tensor:
    """The same, drawn anew for each task by the modules' ``reset_parameters``, [T, P].

    Raises:
        ValueError: a module has parameters, and no such method; the message names it.
    """
    twin = copy.deepcopy(model)
    resets = []
    for path, module in twin.named_modules():
        reset = getattr(module, "reset_parameters", None)
        if reset is not None:
            resets.append(reset)
        elif any(parameter.requires_grad for parameter in module.parameters(recurse=False)):
            raise ValueError(
                f"model has parameters in {path or 'itself'} ({type(module).__name__}), which has no method "
                "reset_parameters to draw them anew for every task"
            )
    rows = []
    for _ in range(tasks):
        for reset in resets:
            reset()
        rows.append(own_parameters(twin, 1))
    return torch.cat(rows)
