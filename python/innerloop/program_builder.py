"""A traced graph → Program, by rules that say what each layer becomes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NoReturn

import torch.fx
import torch.nn.functional as F
from torch import nn

from innerloop.program import Expectation, Kind, Node, Program
from innerloop.tracing import NotLowerable


@dataclass(frozen=True)
class Value:
    """A batch of samples in the traced graph.

    Attributes:
        index: 0 the network's input, i + 1 the output of draft i. memory: equal for values that may share memory.
    """

    index: int
    memory: int


class Batch:
    """The number of samples, x.size(0)."""


@dataclass(frozen=True)
class Sizes:
    """x.shape."""


class Size:
    """A size of a sample, x.size(1): known when a task batch is there, not here."""


@dataclass(frozen=True)
class _Draft:
    """A node whose parameters and buffers are still names."""

    kind: Kind
    inputs: tuple[int, ...]
    parameters: tuple[str | None, ...]
    attributes: tuple[int | float, ...]
    buffers: tuple[str | None, ...]
    path: str
    where: str


Rule = Callable[..., Any]


@dataclass(frozen=True)
class Rules:
    """How each layer becomes nodes: functions of the Builder, for modules the module, and the call's arguments.

    Attributes:
        modules: by class. functions: by the function. methods: of tensors, by name.
    """

    modules: Mapping[type[nn.Module], Rule]
    functions: Mapping[Any, Rule]
    methods: Mapping[Any, Rule]

    def of_module(self, module: nn.Module) -> Rule | None:
        """The rule of the class whose forward the module runs as it is; None where there is none."""
        for base in type(module).__mro__:
            if base in self.modules:
                return self.modules[base]
            if not set(vars(base)) <= _HARMLESS:
                return None
        return None


# What a subclass may define and still compute what its base class does.
_HARMLESS = {
    "__init__", "reset_parameters", "extra_repr",
    "__module__", "__doc__", "__annotations__", "__firstlineno__", "__static_attributes__", "__qualname__",
    "__parameters__", "__orig_bases__", "__type_params__",
}  # fmt: skip


class Builder:
    """Goes through a graph node by node; the rules below are called with it and the node's arguments."""

    def __init__(self, model: nn.Module, graph: torch.fx.Graph, rules: Rules) -> None:
        self.model = model
        self.rules = rules
        self.graph = graph
        self.drafts: list[_Draft] = []
        self.expected: list[Expectation] = []
        self.values: dict[torch.fx.Node, Any] = {}
        self.position = {node: place for place, node in enumerate(graph.nodes)}
        self.names = {id(parameter): name for name, parameter in model.named_parameters()}
        self.node: torch.fx.Node = next(iter(graph.nodes))
        self.path, self.what = "", ""

    def program(self) -> Program:
        for node in self.graph.nodes:
            self.node, self.path = node, node.meta.get("path", "")
            self.values[node] = self._lower_node()
        output = self.values[self.node]
        self.path, self.what = "", "the output of forward"
        if not isinstance(output, Value):
            self.refuse("it is not one tensor computed from the input", "return the logits alone")
        if output.index == 0:
            self.refuse("it is the input itself", "a model needs layers")
        return self._assemble(output.index)

    def _lower_node(self) -> Any:
        node = self.node
        if node.op == "placeholder":
            return Value(0, memory=0)
        if node.op == "output":
            return self._known(node.args[0])
        if node.op == "get_attr":
            self.what = str(node.target).removeprefix("model.")
            self.refuse(
                "forward uses a parameter, buffer or constant directly",
                "put it into a layer of torch.nn, or use engine='torch'",
            )
        args, kwargs = torch.fx.map_arg((node.args, node.kwargs), lambda arg: self.values[arg])
        if node.op == "call_module":
            self.path = str(node.target).removeprefix("model").removeprefix(".")
            module = self.model.get_submodule(self.path)
            self.what = type(module).__name__
            rule = self.rules.of_module(module)
            if rule is None:
                self._refuse_module(module)
            return self._call(lambda *args, **kwargs: rule(self, module, *args, **kwargs), args, kwargs)
        self.what = _spelled(node)
        table = self.rules.methods if node.op == "call_method" else self.rules.functions
        if node.target not in table:
            self.refuse("the native engine has no such layer", "use engine='torch', or one of the layers it has")
        return self._call(lambda *args, **kwargs: table[node.target](self, *args, **kwargs), args, kwargs)

    def _call(self, rule: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        try:
            return rule(*args, **kwargs)
        except TypeError as error:  # arguments that the rule, which has the signature of the function, does not take
            self.refuse(f"it is called in a way that is not understood ({error})", "use engine='torch'")

    def _known(self, argument: Any) -> Any:
        return self.values.get(argument) if isinstance(argument, torch.fx.Node) else argument

    def _refuse_module(self, module: nn.Module) -> NoReturn:
        base = next((base for base in type(module).__mro__ if base in self.rules.modules), None)
        if base is not None:
            self.refuse(
                f"it is a subclass of {base.__name__} with code of its own", f"use {base.__name__}, or engine='torch'"
            )
        self.refuse("the native engine has no such layer", "use engine='torch', or one of the layers it has")

    def refuse(self, why: str, remedy: str) -> NoReturn:
        raise NotLowerable(self.path, self.what, why, remedy)

    def value(self, argument: Any) -> Value:
        """The argument, which must be a batch of samples."""
        if not isinstance(argument, Value):
            self.refuse("it is applied to something that is not a batch of samples", "use engine='torch'")
        return argument

    def add(
        self,
        kind: Kind,
        *inputs: Any,
        module: nn.Module | None = None,
        attributes: tuple[int | float, ...] = (),
        buffers: tuple[str, ...] = (),
        reads: tuple[int | None, ...] | None = None,
        in_place: bool = False,
    ) -> Value:
        """The output of a new node. module: whose weight and bias it has."""
        values = [self.value(argument) for argument in inputs]
        if in_place:
            self._check_in_place(values[0])
        if reads is not None:
            self.expect(values[0], reads)
        parameters: tuple[str | None, ...] = ()
        buffer_names: tuple[str | None, ...] = ()
        if module is not None:
            tensors = (module.weight, module.bias)
            parameters = tuple(None if tensor is None else self._name_of(tensor) for tensor in tensors)
            prefix = f"{self.path}." if self.path else ""
            buffer_names = tuple(None if getattr(module, name) is None else prefix + name for name in buffers)
        self.drafts.append(
            _Draft(
                kind,
                tuple(value.index for value in values),
                parameters,
                attributes,
                buffer_names,
                self.path,
                self.where(),
            )
        )
        is_view = kind is Kind.FLATTEN or in_place
        return Value(len(self.drafts), memory=values[0].memory if is_view else len(self.drafts))

    def _name_of(self, tensor: Any) -> str:
        if id(tensor) not in self.names:
            self.refuse("its weight or bias is no parameter of the model", "use nn.Parameter, or engine='torch'")
        return self.names[id(tensor)]

    def where(self) -> str:
        """The layer at hand, as a user finds it."""
        if self.node.op == "call_module":
            return self.path or self.what
        return f"{self.what} in {self.path}" if self.path else self.what

    def expect(self, value: Value, sizes: tuple[int | None, ...]) -> None:
        """Have the value's shape checked once it is known."""
        self.expected.append(Expectation(value.index, sizes, self.where()))

    def _check_in_place(self, written: Value) -> None:
        """An in-place operation computes what its twin does if nothing reads the memory under another name later."""
        if written.memory == 0:
            self.refuse("it writes to the input in place", "use the operation that returns a new tensor")
        for node, value in self.values.items():
            if isinstance(value, Value) and value.memory == written.memory:
                for user in node.users:
                    if self.position[user] > self.position[self.node]:
                        self.refuse(
                            "it writes in place to a tensor that is read again later",
                            "use the operation that returns a new tensor (inplace=False, x = x + y)",
                        )

    def _assemble(self, output: int) -> Program:
        """The Program of what the output depends on."""
        live = {output}
        for index in range(len(self.drafts), 0, -1):
            if index in live:
                live.update(self.drafts[index - 1].inputs)
        order = [index for index in range(1, len(self.drafts) + 1) if index in live]
        place = {0: 0, **{index: new + 1 for new, index in enumerate(order)}}
        users: dict[str, str] = {}
        buffers: list[str] = []
        nodes = []
        for draft in (self.drafts[index - 1] for index in order):
            for name in draft.parameters:
                if name in users:
                    self.path, self.what = draft.path, f"parameter {name!r}"
                    self.refuse(
                        f"it is used twice (by {users[name]} before)",
                        "give each layer parameters of its own, or use engine='torch'",
                    )
                if name is not None:
                    users[name] = draft.where
            names = list(users)
            running = []
            for name in draft.buffers:
                if name is not None:
                    buffers.append(name)
                running.append(-1 if name is None else len(buffers) - 1)
            nodes.append(
                Node(
                    draft.kind,
                    tuple(place[index] for index in draft.inputs),
                    tuple(-1 if name is None else names.index(name) for name in draft.parameters),
                    (*draft.attributes, *running),
                    draft.where,
                )
            )
        expected = [replace(one, value=place[one.value]) for one in self.expected if one.value in place]
        shapes = {name: tuple(parameter.shape) for name, parameter in self.model.named_parameters()}
        return Program(
            nodes=tuple(nodes),
            output=place[output],
            parameters=tuple(users),
            parameter_shapes=tuple(shapes[name] for name in users),
            buffers=tuple(buffers),
            expectations=tuple(expected),
        )


def _spelled(node: torch.fx.Node) -> str:
    """A function call as a user would write it, the tensors it reads as x."""
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
    if node.target is F.max_pool2d:
        name = "F.max_pool2d"  # torch gives it another one
    arguments = [_argument(argument) for argument in node.args]
    keywords = [f"{key}={_argument(argument)}" for key, argument in node.kwargs.items()]
    if node.op == "call_method":
        return f"{arguments[0]}.{name}({', '.join(arguments[1:] + keywords)})"
    return f"{name}({', '.join(arguments + keywords)})"


def _argument(argument: Any) -> str:
    if isinstance(argument, torch.fx.Node):
        return "x"
    if isinstance(argument, (tuple, list)):
        return "(" + ", ".join(_argument(item) for item in argument) + ")"
    return str(argument)
