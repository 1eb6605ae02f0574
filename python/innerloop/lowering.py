"""nn.Module → Program; or the layer that cannot be lowered, why, and what to do.

What is not understood is refused, so that a Program computes exactly what the module does. No shape is fixed: whether
``x.view(-1, 784)`` fits is checked when a task batch is there (:meth:`innerloop.program.Program.shapes`).
"""

from __future__ import annotations

import copy
import threading
import weakref
from itertools import chain
from typing import Any

from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.nn.utils import parametrize

from innerloop import _native
from innerloop.functional import FunctionalModel, TaskBatchNorm
from innerloop.layer_rules import RULES
from innerloop.program import Kind, Program
from innerloop.program_builder import Builder
from innerloop.tracing import NotLowerable, trace

__all__ = ["Lowered", "NotLowerable", "lower", "lowered"]


def lower(model: nn.Module) -> Program:
    """The model's Program, in the mode (train or eval) that its modules are in.

    Raises:
        NotLowerable: the model does something that no Program can express.
    """
    if torch_module._has_any_global_hook():
        raise NotLowerable("", "a global module hook", "it would not run", "remove it, or use engine='torch'")
    for path, module in model.named_modules():
        _check_module(path, module)
    functional = FunctionalModel(model, "transductive").module  # tracing may write to it; the model stays as it is
    graph, counters = trace(functional, _is_layer)
    program = Builder(model, graph, RULES).program()
    # A number that forward counts up (num_batches_tracked in MetaOptNet's blocks) is no obstacle where nothing
    # depends on it: the next call, and one after a million more, do the same.
    for more in (0, 10**6) if counters else ():
        for module, name in counters:
            vars(module)[name] += more
        if Builder(model, trace(functional, _is_layer)[0], RULES).program() != program:
            why = f"what forward does depends on self.{counters[0][1]}, which it counts up"
            raise NotLowerable("", type(model).__name__, why, "keep state out of forward")
    return program


def _is_layer(module: nn.Module) -> bool:
    """Whether tracing stops at the module: one with a rule, one that cannot be lowered, a BatchNorm's stand-in."""
    is_container = isinstance(module, (nn.Sequential, nn.ModuleList, nn.ModuleDict))
    of_torch = type(module).__module__.startswith("torch.") and not is_container
    return of_torch or isinstance(module, (TaskBatchNorm, *RULES.modules))


def _check_module(path: str, module: nn.Module) -> None:
    name = type(module).__name__
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    if any(hooks):
        raise NotLowerable(path, name, "it has hooks, which would not run", "remove them, or use engine='torch'")
    if parametrize.is_parametrized(module):
        raise NotLowerable(
            path,
            name,
            "its parameters are parametrized",
            "torch.nn.utils.parametrize.remove_parametrizations, or engine='torch'",
        )
    if "forward" in vars(module):
        raise NotLowerable(path, name, "its forward was replaced", "write a class, or use engine='torch'")


# --- kept for every model -------------------------------------------------------------------------


class Lowered:
    """A model's Program with its tensors, or why there is none; and what native_engine.py keeps about it. It does not
    keep the model alive.

    Attributes:
        program: None where the model does not lower. error: why it does not.
        names: of the parameters, in the program's order. code: the program's encoding.
        parameters, buffers: the model's own tensors, in the program's order; the buffers are running statistics.
        memory: checked inner loops by their arguments.
    """

    def __init__(self, model: nn.Module) -> None:
        self.program: Program | None = None
        self.error: NotLowerable | None = None
        self.names: tuple[str, ...] = ()
        self.code: list[int] = []
        self.parameters: list[Tensor] = []
        self.buffers: list[Tensor] = []
        self.has_running_statistics = False
        self.memory: dict[Any, Any] = {}
        self._watch = _Watch(model)
        self._global_hooks = bool(torch_module._has_any_global_hook())
        self._outputs: dict[tuple[int, ...], tuple[str | None, int]] = {}
        self._kinds: list[Any] = []
        try:
            self.program = lower(model)
        except NotLowerable as error:
            self.error = copy.copy(error)  # without the traceback, which holds on to the model
            return
        self.names, self.code = self.program.parameters, self.program.encode()
        self.parameters = [_member(model, "_parameters", name) for name in self.names]
        self.buffers = [_member(model, "_buffers", name) for name in self.program.buffers]
        self._kinds = self._kinds_now()
        norms = [node for node in self.program.nodes if node.kind is Kind.BATCH_NORM]
        self.has_running_statistics = all(node.attributes[1] >= 0 for node in norms)

    def is_current(self) -> bool:
        """Whether the model is still the one that was lowered: the same modules in the same mode with the same
        attributes, hooks, and shapes, dtypes and devices of parameters."""
        return (
            bool(torch_module._has_any_global_hook()) == self._global_hooks
            and self._watch.is_unchanged()
            and self._kinds_now() == self._kinds
        )

    def _kinds_now(self) -> list[Any]:
        """What .data = may change of a parameter."""
        return [(parameter.shape, parameter.dtype, parameter.device) for parameter in self.parameters]

    def outputs(self, sample: tuple[int, ...]) -> tuple[str | None, int]:
        """(what is wrong with samples of a shape, or with the model; the number of outputs for them)."""
        found = self._outputs.get(sample)
        if found is None:
            if self.program is None:
                found = str(self.error), 0
            else:
                try:
                    found = None, self.program.shapes(sample)[self.program.output][0]
                except ValueError as error:
                    found = str(error), 0
            self._outputs[sample] = found
        return found


def lowered(model: nn.Module) -> Lowered:
    """The model lowered; kept until something about the model changes. What its forward reads from elsewhere (a
    global variable, an object that it holds) is taken to stay as it is."""
    known = _known.get(model)
    if known is None or not known.is_current():
        with _one_at_a_time:
            known = Lowered(model)
            _known[model] = known
    return known


_known: weakref.WeakKeyDictionary[nn.Module, Lowered] = weakref.WeakKeyDictionary()
_one_at_a_time = threading.Lock()


def _member(model: nn.Module, kind: str, name: str) -> Tensor:
    """Of what a module calls its parameters, which may be any tensors (a clone's, say)."""
    path, _, leaf = name.rpartition(".")
    members: dict[str, Tensor] = getattr(model.get_submodule(path), kind)
    return members[leaf]


class _Watch:
    """Notices that a model is no longer what it was.

    Tensors are compared by identity: their values may change. The model itself is not kept alive.
    """

    def __init__(self, model: nn.Module) -> None:
        modules = list(model.modules())
        self.attributes = [vars(module) for module in modules]  # numbers, strings; training among them
        self.were = [dict(attributes) for attributes in self.attributes]
        self.hooks = [hooks for module in modules for hooks in (module._forward_hooks, module._forward_pre_hooks)]
        self.hooks += [hooks for module in modules for hooks in (module._backward_hooks, module._backward_pre_hooks)]
        self.members: list[dict[str, Any]] = [
            members for module in modules for members in (module._modules, module._parameters, module._buffers)
        ]
        self.hook_counts = list(map(len, self.hooks))
        self.member_ids = self._member_ids()
        self.dicts: list[dict[Any, Any]] = [*self.attributes, *self.hooks, *self.members]
        # Holding on to them also keeps any other object from getting the id of one of these.
        self.contents = tuple(chain.from_iterable((held, *chain.from_iterable(held.items())) for held in self.dicts))
        standard = vars(nn.Module())
        self.containers = [
            (value, copy.copy(value))
            for attributes in self.attributes
            for name, value in attributes.items()
            if name not in standard and type(value) in (list, dict, set)
        ]

    def _member_ids(self) -> list[int]:
        return list(map(id, chain.from_iterable(map(dict.values, self.members))))

    def is_unchanged(self) -> bool:
        # Nearly always the very same objects, which is seen natively in a microsecond.
        try:
            return (
                _native.hold_exactly(self.dicts, self.contents) or self.is_equal()
            ) and self.containers_are_unchanged()
        except (RuntimeError, ValueError, TypeError):  # an attribute that cannot be compared was replaced
            return False

    def is_equal(self) -> bool:
        return (
            self.attributes == self.were
            and list(map(len, self.hooks)) == self.hook_counts
            and self._member_ids() == self.member_ids
        )

    def containers_are_unchanged(self) -> bool:
        return all(value == before for value, before in self.containers)
