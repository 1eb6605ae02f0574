"""What the native engine makes of a model, in words."""

from __future__ import annotations

import math

from torch import nn

from innerloop import native_engine
from innerloop.inner_loop import BatchNormMode, InnerLoop
from innerloop.losses import Loss
from innerloop.lowering import lowered
from innerloop.ops import maml as native
from innerloop.tasks import TaskBatch


def explain(
    model: nn.Module,
    loss: Loss = "cross_entropy",
    tasks: TaskBatch | None = None,
    *,
    inner_steps: int = 1,
    bn: BatchNormMode = "transductive",
) -> None:
    """Print the Program that the native engine runs for a model, or what stands in its way and what to do.

    Args:
        model: any module.
        loss, inner_steps, bn: as in :func:`innerloop.maml_loss`.
        tasks: with a batch of tasks, also what a step costs and how each layer will be computed.

    Examples:
        >>> innerloop.explain(torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 5)))
        Sequential lowers to
        <BLANKLINE>
        v1 = linear(x, 0.weight, 0.bias)   # 0
        v2 = relu(v1)                      # 1
        v3 = linear(v2, 2.weight, 2.bias)  # 2
        return v3
        >>> innerloop.explain(torch.nn.LSTM(8, 16))
        LSTM does not lower: engine="auto" computes with the torch engine, engine="native" raises...
    """
    print(explanation(model, loss, tasks, inner_steps=inner_steps, bn=bn))


def explanation(
    model: nn.Module,
    loss: Loss = "cross_entropy",
    tasks: TaskBatch | None = None,
    *,
    inner_steps: int = 1,
    bn: BatchNormMode = "transductive",
) -> str:
    """What :func:`explain` prints."""
    name = type(model).__name__
    network = lowered(model)
    if network.error is not None:
        error = network.error
        return (
            f'{name} does not lower: engine="auto" computes with the torch engine, engine="native" raises.\n\n'
            f"layer  {error.path or '(the model itself)'}\nwhat   {error.what}\nwhy    {error.why}\n"
            f"to do  {error.remedy}"
        )
    program = network.program
    assert program is not None
    parts = [f"{name} lowers to\n\n{program}"]
    if native_engine.recognised(loss)[0] is None:
        parts.append('loss is a function that the native engine does not know; it has "cross_entropy" and "mse".')
    if tasks is None:
        return "\n\n".join(parts)
    inner = InnerLoop.create(model, inner_lr=0.01, inner_steps=inner_steps, bn=bn, loss=loss)
    reason = native_engine.why_not_native(model, tasks, inner)
    if reason is not None:
        return "\n\n".join([*parts, f"The torch engine computes these tasks: {reason}"])
    unasked = native_engine.why_not_unasked(tasks)
    if unasked is not None:
        parts.append(f'engine="auto" computes with the torch engine: {unasked}.')
    support, query = tasks.support_x.shape[1], tasks.query_x.shape[1]
    sample = tuple(tasks.support_x.shape[2:])
    cost = program.cost(sample, support, query, inner_steps)
    parameters = sum(math.prod(shape) for shape in program.parameter_shapes)
    size = tasks.support_x.element_size()
    parts.append(
        f"{parameters:,} parameters. A task of {support} + {query} samples of {list(sample)} and {inner_steps} inner "
        f"steps: {cost.flops / 1e6:,.2f} MFLOP in products and convolutions, up to "
        f"{cost.numbers * size / 1e6:,.2f} MB."
    )
    parts.append(native.plan(*native_engine.native_call(model, tasks, inner)))
    return "\n\n".join(parts)
