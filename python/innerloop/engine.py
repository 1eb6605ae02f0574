"""Which engine computes a meta-gradient, and the drop-in MAML step."""

from __future__ import annotations

import copy
import logging
import weakref
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from innerloop import torch_engine
from innerloop.contract import Result
from innerloop.inner_loop import BatchNormMode, InnerLoop, InnerLR, Rate
from innerloop.inner_optimizers import InnerOptimizer
from innerloop.losses import Loss, accuracy_per_task
from innerloop.lowering import Lowered, lowered
from innerloop.ops import maml as native
from innerloop.ops._differentiable import transforms_active
from innerloop.ops.checks import has_kernel
from innerloop.registry import check_choice
from innerloop.tasks import TaskBatch

Engine = Literal["auto", "native", "torch"]
_ENGINES = get_args(Engine)

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")  # of a module

# An autograd loop over tasks is nothing that torch.compile should unroll: in a compiled step it runs as it is.
_by_torch = torch.compiler.disable(torch_engine.meta_result)

log = logging.getLogger("innerloop")


def check_engine(engine: Engine) -> Engine:
    """Refuse a name that is no engine."""
    check_choice(engine, "engine", _ENGINES)
    return engine


def check_lowers(model: nn.Module) -> None:
    """Refuse a model that the native engine cannot run.

    Raises:
        NotLowerable: a ValueError that names the layer.
    """
    error = lowered(model).error
    if error is not None:
        raise copy.copy(error)


def meta_result(
    model: nn.Module,
    tasks: TaskBatch,
    inner: InnerLoop,
    parameters: Mapping[str, Tensor] | None = None,
    engine: Engine = "auto",
) -> Result:
    """The meta-loss of a batch of tasks and what goes with it.

    Args:
        model: what runs. tasks: T tasks. inner: the inner loop.
        parameters: θ₀ in place of the model's own, shared or [T, *shape] (see :func:`torch_engine.meta_result`).
        engine: "native"; "torch"; or "auto", native wherever it computes the same.

    Raises:
        ValueError: the model's outputs are not as many as the tasks' ways; or engine is "native" and cannot be, and
            the message says why.
    """
    if engine != "torch":
        call = _native_call(model, tasks, inner, parameters, engine)
        if call is not None:
            loss, task_losses, logits = native.maml(*call)
            accuracies = accuracy_per_task(logits, tasks.query_y, tasks.query_mask) if tasks.is_classification else None
            return Result(loss, task_losses, logits, accuracies)
    return _by_torch(model, _own(model, parameters), tasks, inner)


def adapt_tasks(
    model: nn.Module,
    tasks: TaskBatch,
    inner: InnerLoop,
    parameters: Mapping[str, Tensor] | None = None,
    engine: Engine = "auto",
    proximal: float = 0.0,
) -> dict[str, Tensor]:
    """θ_K of every task, by parameter name; detached. The arguments are those of :func:`meta_result`; proximal is λ of
    a descent along the gradient plus λ(θₖ − θ₀).

    Returns: [T, *shape] for a parameter that is adapted; θ₀ as it is for the others.
    """
    initial = {name: parameter.detach() for name, parameter in _own(model, parameters).items()}
    if engine != "torch":
        with torch.no_grad():
            given = None if parameters is None else initial
            call = _native_call(model, tasks, inner, given, engine, all_ways=False)
        if call is not None:
            adapted = zip(lowered(model).names, native.adapt(*call, proximal), strict=True)
            # An adapted parameter that the Program does not use has no gradient, and stays as it is for every task.
            unused = {
                name: initial[name].expand(tasks.num_tasks, *parameter.shape)
                for name, parameter in model.named_parameters()
                if name in inner.rates
            }
            return initial | unused | {name: value for name, value in adapted if value.numel()}
    return initial | torch_engine.adapt_tasks(model, initial, tasks, inner, proximal)


def hessian_vector_products(
    model: nn.Module,
    tasks: TaskBatch,
    vectors: Mapping[str, Tensor],
    inner: InnerLoop,
    parameters: Mapping[str, Tensor] | None = None,
    engine: Engine = "auto",
) -> dict[str, Tensor]:
    """The Hessian of every task's support loss at its parameters, of those that have a vector, times it; detached.

    The arguments are those of :func:`meta_result`.

    Args:
        vectors: by name, [T, *shape]. inner: says what BatchNorm does and what the loss is; the Hessian is of the
            parameters that it adapts, which are those of vectors.

    Returns: [T, *shape] by name.
    """
    if engine != "torch":
        with torch.no_grad():
            call = _native_call(model, tasks, inner, parameters, engine, all_ways=False)
        if call is not None:
            values, _, buffers, _, settings = call
            names = lowered(model).names
            given = [vectors.get(name, value.new_empty(0)) for name, value in zip(names, values, strict=True)]
            products = native.hessian_vector_product(values, given, buffers, tasks, settings)
            # A parameter that the Program does not use has no Hessian.
            unused = {name: torch.zeros_like(vector) for name, vector in vectors.items()}
            return unused | {name: value for name, value in zip(names, products, strict=True) if value.numel()}
    return torch_engine.hessian_vector_products(model, _own(model, parameters), tasks, vectors, inner)


def adapt(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    inner: InnerLoop,
    engine: Engine = "auto",
    parameters: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """θ_K of one task with support set x [S, ...], y [S] or [S, *out], by parameter name; detached.

    parameters: θ₀ in place of the model's own, of the parameters' shapes.
    """
    x, y = x.detach()[None], y.detach()[None]
    adapted = adapt_tasks(model, TaskBatch(x, y, x, y), inner, parameters, engine)
    return {name: value[0] if name in inner.rates else value for name, value in adapted.items()}


def maml_loss(
    model: nn.Module,
    tasks: TaskBatch,
    *,
    inner_lr: InnerLR,
    inner_steps: int = 1,
    step_weights: Sequence[float] | Tensor | None = None,
    support_weight: float = 0.0,
    adapt: str | Iterable[str] | None = None,
    first_order: bool = False,
    bn: BatchNormMode = "transductive",
    loss: Loss = "cross_entropy",
    inner_optimizer: InnerOptimizer = "sgd",
    engine: Engine = "auto",
) -> Tensor:
    """The MAML meta-loss of a batch of tasks: a drop-in step for any model and any torch optimizer.

    Computes mean over tasks of [ u·L_support(θ₀) + Σₖ wₖ L_query(θₖ) ] with θₖ₊₁ = θₖ − αₖ ⊙ ∇L_support(θₖ)
    (Finn et al. 2017, algorithm 1, for K steps). Calling ``.backward()`` on it fills the ``.grad`` of the model's
    parameters, and of inner_lr where that requires grad. The model's buffers are never written.

    Args:
        model: any module; called with [S, ...] and [Q, ...] samples of one task.
        tasks: T tasks.
        inner_lr: α: a number; a tensor, 0-d or [K]; or a mapping from parameter name, name prefix or pattern to a
            number or a tensor that is 0-d, [K], parameter-shaped or [K, *parameter]. The longest name counts, and any
            name before a pattern; what a mapping does not name has α = 0.
        inner_steps: K, at least 0.
        step_weights: w, K + 1 numbers for θ₀ … θ_K. None: (0, …, 0, 1).
        support_weight: u.
        adapt: names, name prefixes ("encoder.0" for all under it) or patterns (``*.lora_*``, ``*`` being any text) of
            the parameters that are adapted. None: all that require grad.
        first_order: drop the second derivatives (FOMAML).
        bn: what BatchNorm normalises with: "transductive", the statistics of whatever batch is fed; "support", the
            query with the statistics of the support set; "running", the module's running statistics.
        loss: "cross_entropy", "mse", nn.CrossEntropyLoss() (label_smoothing too), nn.MSELoss(), or any callable
            (outputs [N, *out], targets) → 0-d mean loss, which takes the torch engine.
        inner_optimizer: what makes a step of the gradients: "sgd", as above; "momentum" of 0.9, or "adam" with the
            defaults of torch.optim.Adam, both on the torch engine, and differentiated through.
        engine: "auto", the native engine where it can compute this and else the torch engine, said once in the log
            "innerloop"; "native", which raises where it cannot; "torch". The native engine's gradient cannot be
            differentiated again: that raises. :func:`innerloop.explain` says what becomes of a model.

    Returns: 0-d loss.

    Raises:
        TypeError, ValueError: an argument that does not fit; the message names it and what was expected.

    Warns:
        SecondOrderWarning: the model has attention or recurrent kernels without a second derivative, and slower ones
            take their place; once for a model.

    Examples:
        One task, y = 2 at x = 1, and the model θx at θ = 0: the inner step leads to θ₁ = θ − α·2(θ − 2) = 1, the loss
        is (θ₁ − 2)², and its derivative goes through the step: 2(θ₁ − 2)(1 − 2α).

        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> model.load_state_dict({"weight": torch.zeros(1, 1)})
        <All keys matched successfully>
        >>> x, y = torch.ones(1, 1, 1), torch.full((1, 1, 1), 2.0)  # [T, samples, features]
        >>> tasks = innerloop.TaskBatch(x, y, x, y)
        >>> loss = innerloop.maml_loss(model, tasks, inner_lr=0.25, loss="mse")
        >>> loss.backward()
        >>> loss.item(), model.weight.grad.item()
        (1.0, -1.0)
    """
    check_engine(engine)
    network = None if engine == "torch" or torch.compiler.is_compiling() else lowered(model)
    inner = inner_loop(
        model,
        network,
        inner_lr=inner_lr,
        inner_steps=inner_steps,
        step_weights=step_weights,
        support_weight=support_weight,
        adapt=adapt,
        first_order=first_order,
        bn=bn,
        loss=loss,
        inner_optimizer=inner_optimizer,
    )
    if engine != "torch":
        call = _native_call(model, tasks, inner, None, engine, network)
        if call is not None:
            return native.maml(*call)[0]
    return _by_torch(model, _own(model, None), tasks, inner).loss


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


def _own(model: nn.Module, parameters: Mapping[str, Tensor] | None) -> Mapping[str, Tensor]:
    return dict(model.named_parameters()) if parameters is None else parameters


# --- the native engine ----------------------------------------------------------------------------

_NativeCall = tuple[list[Tensor], list[Tensor], list[Tensor], TaskBatch, native.Settings]


def _native_call(
    model: nn.Module,
    tasks: TaskBatch,
    inner: InnerLoop,
    parameters: Mapping[str, Tensor] | None,
    engine: Engine,
    known: Lowered | None = None,
    all_ways: bool = True,
) -> _NativeCall | None:
    """The arguments of the native op; None where the torch engine takes over.

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


def native_call(model: nn.Module, tasks: TaskBatch, inner: InnerLoop) -> _NativeCall:
    """The arguments of ops.maml.maml.

    Raises:
        ValueError: the native engine cannot compute this, and the message says why.
    """
    call = _native_call(model, tasks, inner, None, "native")
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


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _constants(model: nn.Module, attributes: tuple[Any, ...], sample: tuple[int, ...]) -> tuple[Any, ...]:
    """What a compiled graph takes from a lowered model: plain values."""
    network = lowered(model)
    buffers = () if network.program is None else network.program.buffers
    problem, outputs = network.outputs(sample)
    return problem, network.names, buffers, tuple(network.code), outputs, network.has_running_statistics


def _why_not_native(network: _Network, tasks: TaskBatch, inner: InnerLoop, all_ways: bool = True) -> str | None:
    """What keeps the native engine from computing exactly what the torch engine would; None: nothing.

    all_ways: every output of the head must be some sample's class, as the meta-loss asks and an adaptation does not.
    """
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
