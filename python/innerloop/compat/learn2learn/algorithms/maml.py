"""MAML, one task at a time (learn2learn.algorithms.maml)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from innerloop.compat.learn2learn.algorithms.base_learner import BaseLearner, inner_gradients
from innerloop.compat.learn2learn.utils import Module, clone_module, update_module


def maml_update(model: Module, lr: float | Tensor, grads: Sequence[Tensor | None] | None = None) -> Module:
    """One inner step: each parameter p of a model becomes p − lr·gradient, differentiably; changed and returned.

    Args:
        model: a clone.
        lr: the step size.
        grads: one for each of model.parameters(); None leaves a parameter. If the argument itself is None, updates
            that wait in the parameters' attributes ``update`` are done, as :func:`update_module` says.
    """
    return update_module(model, None if grads is None else [None if grad is None else -lr * grad for grad in grads])


class MAML(BaseLearner):
    """MAML around any module: ``clone()`` for each task, ``adapt(loss)`` for each inner step (Finn et al. 2017).

    The gradients of a clone's loss reach the parameters of the module wrapped, through its inner steps (algorithm 1).
    Tasks cannot be batched in this form; :func:`innerloop.maml_loss` replaces the loop over them.

    Args:
        model: any module. lr: step size of the inner loop.
        first_order: drop the second derivatives (the paper's section 5.2).
        allow_unused: parameters that the loss does not depend on keep their values; None: as allow_nograd.
        allow_nograd: parameters that require no grad keep their values.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float | Tensor,
        first_order: bool = False,
        allow_unused: bool | None = None,
        allow_nograd: bool = False,
    ) -> None:
        super().__init__(model)
        self.lr = lr
        self.first_order = first_order
        self.allow_nograd = allow_nograd
        self.allow_unused = allow_nograd if allow_unused is None else allow_unused

    def clone(
        self, first_order: bool | None = None, allow_unused: bool | None = None, allow_nograd: bool | None = None
    ) -> MAML:
        """A learner for one task, its parameters clones of this one's (:func:`clone_module`); None: as here."""
        return MAML(
            clone_module(self.module),
            lr=self.lr,
            first_order=self.first_order if first_order is None else first_order,
            allow_unused=self.allow_unused if allow_unused is None else allow_unused,
            allow_nograd=self.allow_nograd if allow_nograd is None else allow_nograd,
        )

    def adapt(
        self,
        loss: Tensor,
        first_order: bool | None = None,
        allow_unused: bool | None = None,
        allow_nograd: bool | None = None,
    ) -> None:
        """One gradient step on a loss, 0-d, of this learner; what is None is as at construction.

        Raises:
            RuntimeError: the loss does not depend on a parameter, or one requires no grad, without leave.
        """
        parameters = list(self.module.parameters())
        differentiated = parameters
        if self.allow_nograd if allow_nograd is None else allow_nograd:
            differentiated = [parameter for parameter in parameters if parameter.requires_grad]
        gradients = inner_gradients(
            loss,
            differentiated,
            second_order=not (self.first_order if first_order is None else first_order),
            allow_unused=self.allow_unused if allow_unused is None else allow_unused,
        )
        of = dict(zip(differentiated, gradients, strict=True))
        maml_update(self.module, self.lr, [of.get(parameter) for parameter in parameters])
