"""BatchNorm layers as the engines take them, and MAML++'s, which differ between inner steps."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

# A subclass with a forward of its own may do more than normalise: it is run as it is and follows train() and eval().
_FORWARDS = (_BatchNorm.forward, nn.SyncBatchNorm.forward)


def is_batch_norm(module: nn.Module) -> bool:
    """Whether the engines normalise in a module's place: BatchNorm as torch has it, not a forward of the user's own."""
    return isinstance(module, _BatchNorm) and type(module).forward in _FORWARDS


class PerStepBatchNorm(_BatchNorm):
    """BatchNorm with running statistics, γ and β of its own for each of K inner steps (Antoniou et al. 2019, MAML++).

    Set k is taken by the support pass at θₖ and by the query pass at θₖ₊₁; beyond the last set, the last is taken. As
    in the authors' code, the statistics of the batch at hand normalise it, in training and in evaluation alike. Running
    statistics are collected in training, and nothing here reads them.

    Args:
        source: the layer replaced; every set starts as its γ, β and running statistics. steps: K, at least 1.

    Attributes:
        weight, bias: γ and β, [K, C]; None where the source has none.
        running_mean, running_var: [K, C]; None where the source has none.
        step: the set that forward takes. collecting: whether forward moves its running statistics by ``momentum``.
    """

    def __init__(self, source: _BatchNorm, steps: int) -> None:
        super().__init__(source.num_features, source.eps, source.momentum, affine=False, track_running_stats=False)
        self.steps = steps
        self.step = 0
        self.collecting = False
        self.train(source.training)
        for name, parameter in source._parameters.items():
            if parameter is not None:
                self._parameters[name] = nn.Parameter(parameter.detach().repeat(steps, 1), parameter.requires_grad)
        for name in ("running_mean", "running_var"):
            statistic = source._buffers[name]
            self._buffers[name] = None if statistic is None else statistic.repeat(steps, 1)

    def forward(self, input: Tensor) -> Tensor:
        k = min(self.step, self.steps - 1)
        weight, bias, mean, var = (
            None if sets is None else sets[k] for sets in (self.weight, self.bias, self.running_mean, self.running_var)
        )
        if not self.collecting:
            mean, var = None, None
        momentum = 0.1 if self.momentum is None else self.momentum
        return F.batch_norm(input, mean, var, weight, bias, training=True, momentum=momentum, eps=self.eps)
