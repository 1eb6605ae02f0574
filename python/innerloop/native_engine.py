"""What the native op is called with for a model, tasks and an inner loop; or why it cannot compute what is asked."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from innerloop import torch_engine
from innerloop.inner_loop import InnerLoop, Rate
from innerloop.losses import Loss
from innerloop.lowering import Lowered, lowered
from innerloop.ops import maml as native
from innerloop.ops._differentiable import transforms_active
from innerloop.ops.checks import has_kernel
from innerloop.tasks import TaskBatch

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")  # of a module

log = logging.getLogger("innerloop")

#: What ops.maml.maml takes.
NativeCall = tuple[list[Tensor], list[Tensor], list[Tensor], TaskBatch, native.Settings]


# --- inner loops that are kept --------------------------------------------------------------------


def inner_loop(model: nn.Module, network: Lowered | None = None, **options: Any) -> InnerLoop:
    """:meth:`InnerLoop.create`, kept for the model where the arguments are plain values: checking them anew costs more
    than a step of a small net."""
    inner_lr = options["inner_lr"]
    if torch.compiler.is_compiling() or not isinstance(inner_lr, (int, float)):
        return InnerLoop.create(model, **options)
    kept = network or lowered(model)
    if kept.program is None:
        return InnerLoop.create(model, **options)
    # What create() reads of the parameters that a Program uses, and may change in a model that is lowered; the others
    # take no part in the inner loop.
    learned = [parameter.requires_grad for parameter in kept.parameters]
    try:
        key = (*options, *options.values(), recognised(options["loss"]), torch.is_inference_mode_enabled(), *learned)
        found: InnerLoop | None = kept.memory.get(key)
    except TypeError:  # unhashable: a list of step weights or of names
        return InnerLoop.create(model, **options)
    if found is None:
        found = InnerLoop.create(model, **options)
        if len(kept.memory) >= 128:  # a schedule that changes α at every step does not fill the memory
            kept.memory.clear()
        kept.memory[key] = found
        rates, settings = _settings(kept.names, kept.code, kept.parameters, found)
        kept.memory[id(found)] = _Kept(found, rates, settings, set())
    return found


class _Kept(NamedTuple):
    """What is kept about an inner loop that :func:`inner_loop` made.

    Attributes:
        inner: itself, so that nothing else gets its id. rates, settings: of the native op, for the model's parameters.
        kinds: of tasks that the native engine was found to compute; see _kind().
    """

    inner: InnerLoop
    rates: list[Tensor]
    settings: native.Settings
    kinds: set[Any]


def _kind(tasks: TaskBatch) -> tuple[Any, ...]:
    """What of tasks decides whether the native engine computes them, but for what may change from call to call."""
    x, y = tasks.support_x, tasks.support_y
    ways = tasks.ways if tasks.is_classification else None
    return x.dtype, x.device, x.shape[2:], y.dtype, y.shape[2:], ways


# --- the call -------------------------------------------------------------------------------------


def prepare(
    model: nn.Module,
    tasks: TaskBatch,
    inner: InnerLoop,
    parameters: Mapping[str, Tensor] | None,
    engine: Literal["auto", "native"],
    known: Lowered | None = None,
    all_ways: bool = True,
) -> NativeCall | None:
    """The arguments of the native op; None where the torch engine takes over.

    Args:
        parameters: θ₀ in place of the model's own. known: the model lowered.
        all_ways: every output of the head must be some sample's class, as the meta-loss asks and an adaptation does
            not.

    Raises:
        ValueError: engine is "native" and it cannot be.
    """
    kept: _Kept | None = None
    if parameters is None and not torch.compiler.is_compiling():
        known = known or lowered(model)
        kept = known.memory.get(id(inner))
        if kept and (engine, all_ways, *_kind(tasks)) in kept.kinds and _why_not_now(tasks) is None:
            return known.parameters, kept.rates, known.buffers, tasks, kept.settings
    network = _network(model, tasks, known)
    if parameters is not None:
        torch_engine.per_task_parameters(model, parameters, tasks.num_tasks)
        network = network._replace(parameters=[parameters[name] for name in network.names])
    reason = network.problem or _why_not_native(network, tasks, inner, all_ways)
    if reason is not None and engine == "native":
        raise ValueError(f"engine is 'native', but {reason}")
    if reason is None and engine == "auto":
        reason = why_not_unasked(tasks)
    if reason is not None:
        _tell(model, reason)
        return None
    if kept is None:
        rates, settings = _settings(network.names, network.code, network.parameters, inner)
    else:
        rates, settings = kept.rates, kept.settings
        kept.kinds.add((engine, all_ways, *_kind(tasks)))
    return list(network.parameters), rates, list(network.buffers), tasks, settings


def native_call(
    model: nn.Module,
    tasks: TaskBatch,
    inner: InnerLoop,
    parameters: Mapping[str, Tensor] | None = None,
    all_ways: bool = True,
) -> NativeCall:
    """The arguments of the native op, and no way around it.

    Raises:
        ValueError: the native engine cannot compute this, and the message says why.
    """
    call = prepare(model, tasks, inner, parameters, "native", all_ways=all_ways)
    assert call is not None
    return call


def why_not_native(model: nn.Module, tasks: TaskBatch, inner: InnerLoop) -> str | None:
    """What keeps the native engine from computing what the torch engine would; None: nothing."""
    network = _network(model, tasks)
    return network.problem or _why_not_native(network, tasks, inner)


def why_not_unasked(tasks: TaskBatch) -> str | None:
    """Why engine="auto" leaves tasks that the native engine could compute to the torch engine; None: it does not."""
    if tasks.device.type != "cuda":
        return None
    return f"tasks are on {tasks.device}, and its CUDA form has not been run on a GPU yet: engine='native' runs it"


def _tell(model: nn.Module, reason: str) -> None:
    """Say once for a model why the torch engine runs it."""
    told = _told.setdefault(model, set())
    if reason not in told:
        told.add(reason)
        log.warning("%s: the torch engine computes the meta-gradient: %s", type(model).__name__, reason)


#: What has been said about a model: as long as it lives, in whatever mode it is lowered anew.
_told: weakref.WeakKeyDictionary[nn.Module, set[str]] = weakref.WeakKeyDictionary()


class _Network(NamedTuple):
    """A lowered model with its tensors, for samples of one shape.

    Attributes:
        problem: why there is none. names, parameters, buffers: in the program's order. code: Program.encode().
        outputs: their number. has_running_statistics: every BatchNorm has them. memory: see inner_loop().
    """

    problem: str | None
    names: tuple[str, ...]
    code: Sequence[int]
    parameters: Sequence[Tensor]
    buffers: Sequence[Tensor]
    outputs: int
    has_running_statistics: bool
    memory: Mapping[Any, Any]


def _network(model: nn.Module, tasks: TaskBatch, known: Lowered | None = None) -> _Network:
    sample = tuple(tasks.support_x.shape[2:])
    if torch.compiler.is_compiling():
        # A compiled graph has the Program as a constant, and is made anew for other attributes or hooks of the modules,
        # training among them; it follows tensors through the module alone.
        problem, names, buffers, code, outputs, statistics = _constants(model, _attributes(model), sample)
        parameters = [model.get_parameter(name) for name in names]
        running = [model.get_buffer(name) for name in buffers]
        return _Network(problem, names, code, parameters, running, outputs, statistics, {})
    network = known or lowered(model)
    problem, outputs = network.outputs(sample)
    return _Network(
        problem,
        network.names,
        network.code,
        network.parameters,
        network.buffers,
        outputs,
        network.has_running_statistics,
        network.memory,
    )


_PLAIN = (bool, int, float, str)


def _attributes(model: nn.Module) -> tuple[Any, ...]:
    """Numbers, strings and tuples of them that modules have, such as a norm's eps, and how many hooks. By their hashes:
    of a number alone torch.compile would make an input of the graph."""
    found = []
    for module in model.modules():
        for name, value in vars(module).items():
            if name in _HOOKS:
                found.append(len(value))
            elif type(value) in _PLAIN or (type(value) is tuple and all(type(item) in _PLAIN for item in value)):
                found.append(hash(value))
    return tuple(found)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]  # torch gives it no types
def _constants(model: nn.Module, attributes: tuple[Any, ...], sample: tuple[int, ...]) -> tuple[Any, ...]:
    """What a compiled graph takes from a lowered model: plain values."""
    network = lowered(model)
    buffers = () if network.program is None else network.program.buffers
    problem, outputs = network.outputs(sample)
    return problem, network.names, buffers, tuple(network.code), outputs, network.has_running_statistics


def _why_not_native(network: _Network, tasks: TaskBatch, inner: InnerLoop, all_ways: bool = True) -> str | None:
    """What keeps the native engine from computing exactly what the torch engine would; None: nothing."""
    x = tasks.support_x
    if x.device.type not in ("cpu", "cuda"):
        return f"tasks are on {x.device}, and it computes on the CPU and on CUDA"
    if not has_kernel("maml", x):
        return f"tasks are on {x.device}, and this installation has no CUDA library"
    if x.dtype not in (torch.float32, torch.float64):
        return f"tasks have dtype {x.dtype}, and it computes in float32 and float64"
    for parameter in network.parameters:
        if parameter.dtype != x.dtype or parameter.device != x.device:
            return f"a parameter is {parameter.dtype} on {parameter.device}, and tasks are {x.dtype} on {x.device}"
    if inner.optimizer != "sgd":
        return f"inner_optimizer is {inner.optimizer!r}, and its steps are those of plain gradient descent, 'sgd'"
    kind, _ = recognised(inner.loss)
    if kind is None:
        return "loss is a function that it does not know; it has 'cross_entropy' and 'mse'"
    if (kind == "mse") == tasks.is_classification:
        return f"loss is {kind} and targets have dtype {tasks.support_y.dtype}"
    outputs = network.outputs
    if tasks.is_classification and (tasks.ways > outputs or (all_ways and tasks.ways < outputs)):
        return f"tasks has {tasks.ways} ways, but the model's head has {outputs} outputs: make them equal"
    if tasks.is_classification and tasks.support_y.dim() != 2:
        return f"support_y has shape {tuple(tasks.support_y.shape)}, expected a label for each sample"
    if not tasks.is_classification and tasks.support_y.shape[2:] != (outputs,):
        return f"support_y has target shape {tuple(tasks.support_y.shape[2:])}, expected the model's ({outputs},)"
    if inner.bn == "running" and not network.has_running_statistics:
        return "bn is 'running', but the model has a BatchNorm layer with track_running_stats=False"
    if inner.rates and inner.steps and not any(name in inner.rates for name in network.names):
        return "the support loss does not depend on any adapted parameter"
    return _why_not_now(tasks)


def _why_not_now(tasks: TaskBatch) -> str | None:
    """The part of it that may change from call to call."""
    x = tasks.support_x
    if torch.is_grad_enabled() and (
        x.requires_grad or tasks.query_x.requires_grad or tasks.support_y.requires_grad or tasks.query_y.requires_grad
    ):
        return "tasks require grad, and it has gradients of parameters and inner_lr only"
    if torch.compiler.is_compiling():
        return None
    if transforms_active():
        return (
            "a torch.func transform or forward-mode differentiation is active, and it has gradients by backward() only"
        )
    if torch.is_autocast_enabled(x.device.type):
        return "autocast is enabled, and it computes in one dtype"
    return None


def recognised(loss: Loss) -> tuple[Literal["cross_entropy", "mse"] | None, float]:
    """(the loss that the native engine has for it, its label smoothing)."""
    if isinstance(loss, str):
        return loss, 0.0
    if type(loss) is nn.MSELoss and loss.reduction == "mean" and _runs_as_it_is(loss):
        return "mse", 0.0
    if (
        type(loss) is nn.CrossEntropyLoss
        and loss.reduction == "mean"
        and loss.weight is None
        and loss.ignore_index == -100
        and _runs_as_it_is(loss)
    ):
        return "cross_entropy", loss.label_smoothing
    return None, 0.0


def _runs_as_it_is(module: nn.Module) -> bool:
    """Whether a call of the module does what its class says: no hooks, and no forward of its own."""
    return "forward" not in vars(module) and not any(getattr(module, name) for name in _HOOKS)


# "per_step" is left where a model has no BatchNorm: PerStepBatchNorm does not lower.
_BN_CODES = {"transductive": 0, "support": 1, "running": 2, "per_step": 0}


def _settings(
    names: Sequence[str], code: Sequence[int], parameters: Sequence[Tensor], inner: InnerLoop
) -> tuple[list[Tensor], native.Settings]:
    """(α in the op's form, the rest)."""
    kind, smoothing = recognised(inner.loss)
    rates = [_matrix(inner.rates.get(name), parameter) for name, parameter in zip(names, parameters, strict=True)]
    settings = native.Settings(
        program=code,
        bn=_BN_CODES[inner.bn],
        loss=int(kind == "mse"),
        label_smoothing=smoothing,
        steps=inner.steps,
        step_weights=list(inner.step_weights),
        support_weight=inner.support_weight,
        first_order=inner.first_order,
    )
    return rates, settings


def _matrix(rate: Rate | None, parameter: Tensor) -> Tensor:
    """α of a parameter as [1 or K, 1 or numel]; [0, 0] where it is not adapted."""
    if rate is None:
        return parameter.new_empty(0, 0)
    value = rate.value
    if rate.per_step:
        return value.reshape(len(value), value[0].numel() if len(value) else 0)
    return value.reshape(1, -1)
