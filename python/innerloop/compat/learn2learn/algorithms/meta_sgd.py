"""Meta-SGD, one task at a time (learn2learn.algorithms.meta_sgd)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from innerloop.compat.learn2learn.algorithms.base_learner import BaseLearner, inner_gradients
from innerloop.compat.learn2learn.utils import Module, clone_module, clone_parameters, update_module


def meta_sgd_update(model: Module, lrs: Sequence[Tensor] | nn.ParameterList, grads: Sequence[Tensor | None]) -> Module:
    """One inner step: each parameter p of a model becomes p − α ⊙ gradient, differentiably; changed and returned.

    Args:
        model: a clone. lrs, grads: one for each of model.parameters(), of its shape; a gradient of None leaves one.

    Raises:
        ValueError: lrs and grads are not equally many.
    """
    if len(lrs) != len(grads):
        raise ValueError(f"lrs has {len(lrs)} entries, expected {len(grads)}, one for each parameter")
    return update_module(model, [None if grad is None else -lr * grad for lr, grad in zip(lrs, grads, strict=True)])


class MetaSGD(BaseLearner):
    """Meta-SGD around any module: MAML whose α, one for each entry of each parameter, is learned (Li et al. 2017).

    ``parameters()`` has the module's and the rates. Tasks cannot be batched in this form;
    :func:`innerloop.maml_loss` with a mapping of tensors as ``inner_lr`` replaces the loop over them.

    Args:
        model: any module. lr: what every rate begins with.
        first_order: drop the second derivatives; the gradients of the rates stay.
        lrs: the rates, one for each of model.parameters(); given, lr is not used.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float = 1.0,
        first_order: bool = False,
        lrs: Sequence[Tensor] | nn.ParameterList | None = None,
    ) -> None:
        super().__init__(model)
        if lrs is None:
            lrs = nn.ParameterList([nn.Parameter(torch.full_like(p, lr)) for p in model.parameters()])
        self.lrs: Sequence[Tensor] | nn.ParameterList = lrs
        self.first_order = first_order

    def clone(self) -> MetaSGD:
        """A learner for one task, its parameters and rates clones of this one's."""
        return MetaSGD(clone_module(self.module), first_order=self.first_order, lrs=clone_parameters(self.lrs))

    def adapt(self, loss: Tensor, first_order: bool | None = None) -> None:
        """One gradient step on a loss, 0-d, of this learner; first_order None: as at construction.

        Raises:
            RuntimeError: the loss does not depend on a parameter, or one requires no grad.
        """
        first_order = self.first_order if first_order is None else first_order
        parameters = list(self.module.parameters())
        gradients = inner_gradients(loss, parameters, second_order=not first_order, allow_unused=False)
        meta_sgd_update(self.module, self.lrs, gradients)
