"""What one inner loop is asked to do: the settings that every engine reads.

Symbols, as in the recurrence: θₖ the adapted parameters after k steps, αₖ the inner learning rate of step k, wₖ the
weight of the query loss at θₖ and u the weight of the support loss at θ₀ in the meta-loss

    mean over tasks of [ u·L_support(θ₀) + Σₖ wₖ L_query(θₖ) ],    θₖ₊₁ = θₖ − αₖ ⊙ ∇L_support(θₖ),  k = 0 … K−1.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from innerloop.inner_optimizers import InnerOptimizer
from innerloop.losses import Loss
from innerloop.norms import is_batch_norm
from innerloop.ops.checks import check_finite, is_finite
from innerloop.registry import check_choice, nearest

#: What BatchNorm layers can normalise with; "per_step" is for those of MAML++ (norms.py).
BatchNormMode = Literal["transductive", "support", "running"]
AnyBatchNormMode = Literal[BatchNormMode, "per_step"]

#: α as users write it: one for everything, or by parameter name, name prefix or pattern; a parameter without one stays
#: fixed.
InnerLR = float | Tensor | Mapping[str, float | Tensor]


#: Inner steps beyond this are a mistake; the native op has the same limit.
MOST_STEPS = 1_000_000


@dataclass(frozen=True)
class Rate:
    """The α of one parameter: 0-d or parameter-shaped; with a leading [K] where it differs between steps."""

    value: Tensor
    per_step: bool = False

    def at(self, step: int) -> Tensor:
        """α of one step: 0-d or parameter-shaped."""
        return self.value[step] if self.per_step else self.value


@dataclass(frozen=True)
class InnerLoop:
    """A validated inner loop; :meth:`create` makes one from the arguments that users give.

    Attributes:
        steps: K.
        rates: α of every adapted parameter, by name; a parameter that is not named is not adapted.
        step_weights: w, K + 1 numbers. support_weight: u.
        first_order: drop the Hessian from the meta-gradient; gradients of α stay.
        bn: what BatchNorm normalises with: "transductive", the statistics of the batch at hand; "support", the query
            with the statistics of the support set at the same θₖ; "running", the module's running statistics;
            "per_step", the statistics of the batch at hand by the PerStepBatchNorm layers of the model.
        loss: "cross_entropy", "mse" or a callable.
        optimizer: what makes a step of the gradients; "sgd" is the line above, others are in inner_optimizers.py.
        collecting: passes move the running statistics of the model's PerStepBatchNorm layers that are in train(), as
            training MAML++ does: nothing else of a model is ever written, and by nobody else.
    """

    steps: int
    rates: Mapping[str, Rate]
    step_weights: tuple[float, ...]
    support_weight: float
    first_order: bool
    bn: AnyBatchNormMode
    loss: Loss
    optimizer: InnerOptimizer
    collecting: bool = False

    @classmethod
    def create(
        cls,
        model: nn.Module,
        *,
        inner_lr: InnerLR,
        inner_steps: int = 1,
        step_weights: Sequence[float] | Tensor | None = None,
        support_weight: float = 0.0,
        adapt: str | Iterable[str] | None = None,
        first_order: bool = False,
        bn: AnyBatchNormMode = "transductive",
        loss: Loss = "cross_entropy",
        inner_optimizer: InnerOptimizer = "sgd",
    ) -> InnerLoop:
        """Check the arguments of :func:`innerloop.maml_loss` against a model.

        Raises:
            TypeError, ValueError: the message names the argument, what it was and what was expected.
        """
        if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
            raise TypeError(
                f"model is a {type(model).__name__}, whose hooks no inner loop runs: give the module inside it, and "
                "share tasks between processes by innerloop.fit, or by DistributedDataParallel around the algorithm"
            )
        if not isinstance(inner_steps, int) or not 0 <= inner_steps <= MOST_STEPS:
            raise ValueError(f"inner_steps is {inner_steps!r}, expected an integer from 0 to {MOST_STEPS:,}")
        check_choice(bn, "bn", get_args(AnyBatchNormMode))
        if bn == "per_step" and any(map(is_batch_norm, model.modules())):
            raise ValueError(
                "bn is 'per_step', but the model has a BatchNorm layer with one γ and β for all steps: "
                "innerloop.get('maml_pp') gives each its own"
            )
        if not callable(loss) and not (isinstance(loss, str) and loss in ("cross_entropy", "mse")):
            raise ValueError(f"loss is {loss!r}, expected 'cross_entropy', 'mse' or a callable")
        check_choice(inner_optimizer, "inner_optimizer", get_args(InnerOptimizer))
        check_finite(support_weight, "support_weight")
        return cls(
            steps=inner_steps,
            rates=_resolve_rates(dict(model.named_parameters()), inner_lr, inner_steps, adapt),
            step_weights=_check_step_weights(step_weights, inner_steps),
            support_weight=float(support_weight),
            first_order=first_order,
            bn=bn,
            loss=loss,
            optimizer=inner_optimizer,
        )


def _check_step_weights(weights: Sequence[float] | Tensor | None, steps: int) -> tuple[float, ...]:
    if weights is None:
        return (*[0.0] * steps, 1.0)
    if isinstance(weights, Tensor) and weights.requires_grad:
        raise ValueError(
            "step_weights requires grad, but the meta-loss is not differentiated in it; pass a detached one"
        )
    try:
        numbers = tuple(float(weight) for weight in weights)
    except (TypeError, ValueError):
        raise TypeError(f"step_weights is {weights!r}, expected inner_steps + 1 = {steps + 1} numbers") from None
    if len(numbers) != steps + 1:
        raise ValueError(
            f"step_weights has {len(numbers)} entries, expected inner_steps + 1 = {steps + 1}: "
            "one for the query loss before adaptation and one after each step"
        )
    if not all(map(is_finite, numbers)):
        raise ValueError(f"step_weights is {numbers}, expected finite numbers")
    return numbers


def is_under(name: str, prefix: str) -> bool:
    """Whether a parameter's name is the prefix, or lies in the module that the prefix names.

    The prefix may be a pattern of fnmatch: ``*`` stands for any text, dots included, ``?`` for one character.
    """
    if _is_pattern(prefix):
        return fnmatchcase(name, prefix) or fnmatchcase(name, prefix + ".*")
    return name == prefix or name.startswith(prefix + ".")


def _is_pattern(prefix: str) -> bool:
    return any(character in prefix for character in "*?[")


def _matching(names: Iterable[str], prefix: str, argument: str) -> list[str]:
    names = list(names)
    matches = [name for name in names if is_under(name, prefix)]
    if not matches:
        what = "a pattern that fits no parameter" if _is_pattern(prefix) else "which is no parameter"
        raise ValueError(f"{argument} names {prefix!r}, {what} of the model.{nearest(prefix, names)}")
    return matches


def _resolve_rates(
    parameters: Mapping[str, nn.Parameter],
    inner_lr: InnerLR,
    steps: int,
    adapt: str | Iterable[str] | None,
) -> dict[str, Rate]:
    if adapt is None:
        adapted = {name for name, parameter in parameters.items() if parameter.requires_grad}
    else:
        several = isinstance(adapt, Iterable) and not isinstance(adapt, (str, Tensor))
        prefixes: list[Any] = list(adapt) if several else [adapt]
        if not all(isinstance(prefix, str) for prefix in prefixes):
            raise TypeError(f"adapt is {adapt!r}, expected a parameter's name, or several")
        adapted = {name for prefix in prefixes for name in _matching(parameters, prefix, "adapt")}
    if not isinstance(inner_lr, Mapping):
        value, per_step = _common_rate(inner_lr, steps, "inner_lr")
        return {
            name: Rate(_on(value, parameter), per_step) for name, parameter in parameters.items() if name in adapted
        }
    rates = {}
    # The longest name that matches a parameter is its α, and any name comes before a pattern.
    for prefix in sorted(inner_lr, key=lambda prefix: (not _is_pattern(prefix), len(prefix))):
        for name in _matching(parameters, prefix, "inner_lr"):
            if name in adapted:
                rates[name] = _parameter_rate(prefix, name, inner_lr[prefix], parameters[name], steps)
    return {name: rates[name] for name in parameters if name in rates}


def _on(value: float | Tensor, parameter: nn.Parameter) -> Tensor:
    """α where a parameter is, in its dtype. A number is filled in there: a copy of it would wait for a GPU."""
    if isinstance(value, Tensor):
        return value.to(parameter)
    return torch.full((), value, dtype=parameter.dtype, device=parameter.device)


def _common_rate(value: float | Tensor, steps: int, argument: str) -> tuple[float | Tensor, bool]:
    """α for any parameter: a number or 0-d, or [K] one for each step."""
    if not isinstance(value, Tensor):
        check_finite(value, argument)
        return float(value), False
    if not value.is_floating_point():
        raise TypeError(f"{argument} has dtype {value.dtype}, expected floating point")
    if value.dim() == 0:
        return value, False
    if value.shape == (steps,):
        return value, True
    raise ValueError(
        f"{argument} has shape {tuple(value.shape)}, expected a number, a 0-d tensor or [inner_steps] = [{steps}]"
    )


def _parameter_rate(prefix: str, name: str, value: float | Tensor, parameter: nn.Parameter, steps: int) -> Rate:
    argument = f"inner_lr[{prefix!r}]"
    shape = parameter.shape
    # Only a parameter's full name can carry a value of its shape: a prefix stands for parameters of many shapes.
    if isinstance(value, Tensor) and value.dim() > 0 and prefix == name and value.is_floating_point():
        if value.shape == shape == (steps,) and steps > 1:
            raise ValueError(
                f"{argument} has shape {tuple(shape)}, which is both [inner_steps] and the parameter's shape: "
                f"pass [inner_steps, *parameter] = {[steps, *shape]} to say which is meant"
            )
        if value.shape == shape:
            return Rate(_on(value, parameter))
        if value.shape == (steps, *shape):
            return Rate(_on(value, parameter), per_step=True)
        if value.shape != (steps,):
            raise ValueError(
                f"{argument} has shape {tuple(value.shape)}, expected 0-d, [inner_steps] = [{steps}], the parameter's "
                f"{list(shape)} or [inner_steps, *parameter] = {[steps, *shape]}"
            )
    common, per_step = _common_rate(value, steps, argument)
    return Rate(_on(common, parameter), per_step)
