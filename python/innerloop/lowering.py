"""nn.Module → Program; or the layer that cannot be lowered, why, and what to do.

What is not understood is refused, so that a Program computes exactly what the module does. No shape is fixed: whether
``x.view(-1, 784)`` fits is checked when a task batch is there (:meth:`innerloop.program.Program.shapes`).
"""

from __future__ import annotations

import copy
import operator
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NoReturn

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.nn.utils import parametrize

from innerloop.functional import FunctionalModel, TaskBatchNorm
from innerloop.program import Expectation, Kind, Node, Program
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
    program = _Builder(model, graph).program()
    # A number that forward counts up (num_batches_tracked in MetaOptNet's blocks) is no obstacle where nothing
    # depends on it: the next call, and one after a million more, do the same.
    for more in (0, 10**6) if counters else ():
        for module, name in counters:
            vars(module)[name] += more
        if _Builder(model, trace(functional, _is_layer)[0]).program() != program:
            why = f"what forward does depends on self.{counters[0][1]}, which it counts up"
            raise NotLowerable("", type(model).__name__, why, "keep state out of forward")
    return program


# --- modules --------------------------------------------------------------------------------------


def _layer_class(module: nn.Module) -> type[nn.Module] | None:
    """The class in the table of layers that the module runs as it is; None where there is none."""
    for base in type(module).__mro__:
        if base in _MODULES:
            return base
        if not set(vars(base)) <= _HARMLESS:
            return None
    return None


# What a subclass may define and still compute what its base class does.
_HARMLESS = {
    "__init__", "reset_parameters", "extra_repr",
    "__module__", "__doc__", "__annotations__", "__firstlineno__", "__static_attributes__", "__qualname__",
    "__parameters__", "__orig_bases__", "__type_params__",
}  # fmt: skip


def _is_layer(module: nn.Module) -> bool:
    """Whether tracing stops at the module: one of the table, one that cannot be lowered, or a BatchNorm's stand-in."""
    is_container = isinstance(module, (nn.Sequential, nn.ModuleList, nn.ModuleDict))
    of_torch = type(module).__module__.startswith("torch.") and not is_container
    return of_torch or isinstance(module, (TaskBatchNorm, *_MODULES))


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


# --- graph to Program -----------------------------------------------------------------------------


@dataclass(frozen=True)
class _Value:
    """A batch of samples in the traced graph.

    Attributes:
        index: 0 the network's input, i + 1 the output of draft i. memory: equal for values that may share memory.
    """

    index: int
    memory: int


class _Batch:
    """The number of samples, x.size(0)."""


@dataclass(frozen=True)
class _Sizes:
    """x.shape."""


class _Size:
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


class _Builder:
    """Goes through a graph node by node; the rules below are called with it and the node's arguments."""

    def __init__(self, model: nn.Module, graph: torch.fx.Graph) -> None:
        self.model = model
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
        if not isinstance(output, _Value):
            self.refuse("it is not one tensor computed from the input", "return the logits alone")
        if output.index == 0:
            self.refuse("it is the input itself", "a model needs layers")
        return self._assemble(output.index)

    def _lower_node(self) -> Any:
        node = self.node
        if node.op == "placeholder":
            return _Value(0, memory=0)
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
            cls = _layer_class(module)
            if cls is None:
                self._refuse_module(module)
            return self._call(lambda *args, **kwargs: _MODULES[cls](self, module, *args, **kwargs), args, kwargs)
        self.what = _spelled(node)
        table: dict[Any, Callable[..., Any]] = _METHODS if node.op == "call_method" else _FUNCTIONS
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
        base = next((base for base in type(module).__mro__ if base in _MODULES), None)
        if base is not None:
            self.refuse(
                f"it is a subclass of {base.__name__} with code of its own", f"use {base.__name__}, or engine='torch'"
            )
        self.refuse("the native engine has no such layer", "use engine='torch', or one of the layers it has")

    def refuse(self, why: str, remedy: str) -> NoReturn:
        raise NotLowerable(self.path, self.what, why, remedy)

    def value(self, argument: Any) -> _Value:
        """The argument, which must be a batch of samples."""
        if not isinstance(argument, _Value):
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
    ) -> _Value:
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
            parameters = tuple(None if tensor is None else self.names[id(tensor)] for tensor in tensors)
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
        return _Value(len(self.drafts), memory=values[0].memory if is_view else len(self.drafts))

    def where(self) -> str:
        """The layer at hand, as a user finds it."""
        if self.node.op == "call_module":
            return self.path or self.what
        return f"{self.what} in {self.path}" if self.path else self.what

    def expect(self, value: _Value, sizes: tuple[int | None, ...]) -> None:
        """Have the value's shape checked once it is known."""
        self.expected.append(Expectation(value.index, sizes, self.where()))

    def _check_in_place(self, written: _Value) -> None:
        """An in-place operation computes what its twin does if nothing reads the memory under another name later."""
        if written.memory == 0:
            self.refuse("it writes to the input in place", "use the operation that returns a new tensor")
        for node, value in self.values.items():
            if isinstance(value, _Value) and value.memory == written.memory:
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
    if node.target in _FUNCTION_NAMES:
        name = _FUNCTION_NAMES[node.target]
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


# --- rules: one for each layer, with the signature of the torch function --------------------------


def _pair(value: Any) -> tuple[int, int]:
    if isinstance(value, int):
        return value, value
    if len(value) == 1:
        return value[0], value[0]
    first, second = value
    return first, second


def _linear(b: _Builder, module: Any, input: Any) -> _Value:
    return b.add(Kind.LINEAR, input, module=module)


def _conv2d(b: _Builder, module: Any, input: Any) -> _Value:
    advice = "use a plain convolution, or engine='torch'"
    if module.groups != 1:
        b.refuse(f"groups is {module.groups}, and the native engine has groups=1 only", advice)
    if _pair(module.dilation) != (1, 1):
        b.refuse(f"dilation is {module.dilation}, and the native engine has dilation=1 only", advice)
    if module.padding_mode != "zeros":
        b.refuse(f"padding_mode is {module.padding_mode!r}, and the native engine pads with zeros only", advice)
    padding = module.padding
    if padding == "valid":
        padding = 0
    elif padding == "same":
        if any(size % 2 == 0 for size in module.kernel_size):
            b.refuse(f"padding is 'same' with a kernel of {module.kernel_size}: more on one side", advice)
        padding = [size // 2 for size in module.kernel_size]
    return b.add(Kind.CONV2D, input, module=module, attributes=(*_pair(module.stride), *_pair(padding)))


def _batch_norm(*trailing: None) -> Callable[..., _Value]:
    def rule(b: _Builder, module: Any, input: Any) -> _Value:
        return b.add(
            Kind.BATCH_NORM,
            input,
            module=module,
            attributes=(float(module.eps),),
            buffers=("running_mean", "running_var"),
            reads=(module.num_features, *trailing),
        )

    return rule


def _layer_norm(b: _Builder, module: Any, input: Any) -> _Value:
    return b.add(
        Kind.LAYER_NORM,
        input,
        module=module,
        attributes=(float(module.eps),),
        reads=tuple(module.normalized_shape),
    )


def _group_norm(b: _Builder, module: Any, input: Any) -> _Value:
    value = b.add(Kind.GROUP_NORM, input, module=module, attributes=(float(module.eps), module.num_groups))
    return value


def _relu(b: _Builder, input: Any, inplace: bool = False) -> _Value:
    return b.add(Kind.RELU, input, in_place=inplace)


def _leaky_relu(b: _Builder, input: Any, negative_slope: float = 0.01, inplace: bool = False) -> _Value:
    return b.add(Kind.LEAKY_RELU, input, attributes=(float(negative_slope),), in_place=inplace)


def _gelu(b: _Builder, input: Any, *, approximate: str = "none") -> _Value:
    return b.add(Kind.GELU, input, attributes=(int(approximate == "tanh"),))


def _tanh(b: _Builder, input: Any) -> _Value:
    return b.add(Kind.TANH, input)


def _sigmoid(b: _Builder, input: Any) -> _Value:
    return b.add(Kind.SIGMOID, input)


def _max_pool2d(
    b: _Builder,
    input: Any,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> _Value:
    if _pair(dilation) != (1, 1):
        b.refuse(f"dilation is {dilation}, and the native engine has dilation=1 only", "use engine='torch'")
    if return_indices:
        b.refuse("return_indices is set", "leave it out, or use engine='torch'")
    _refuse_ceil_mode(b, ceil_mode)
    return b.add(Kind.MAX_POOL, input, attributes=_window(kernel_size, stride, padding))


def _avg_pool2d(
    b: _Builder,
    input: Any,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> _Value:
    if divisor_override is not None:
        b.refuse("divisor_override is set", "leave it out, or use engine='torch'")
    _refuse_ceil_mode(b, ceil_mode)
    return b.add(
        Kind.AVG_POOL, input, attributes=(*_window(kernel_size, stride, padding), int(bool(count_include_pad)))
    )


def _refuse_ceil_mode(b: _Builder, ceil_mode: bool) -> None:
    if ceil_mode:
        b.refuse("ceil_mode is set, and the native engine rounds down", "use ceil_mode=False, or engine='torch'")


def _window(kernel_size: Any, stride: Any, padding: Any) -> tuple[int, ...]:
    # torch takes an empty stride for none
    stride = kernel_size if stride is None or stride == () or stride == [] else stride
    return *_pair(kernel_size), *_pair(stride), *_pair(padding)


def _adaptive_avg_pool2d(b: _Builder, input: Any, output_size: Any) -> _Value:
    if output_size not in (1, (1, 1), [1, 1]):
        b.refuse(
            f"output_size is {output_size}, and the native engine has 1 only", "use 1, AvgPool2d or engine='torch'"
        )
    return b.add(Kind.GLOBAL_AVG_POOL, input)


def _mean(b: _Builder, input: Any, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> _Value:
    dims = sorted(dim) if isinstance(dim, (tuple, list)) else None
    if dims not in ([2, 3], [-2, -1]) or dtype is not None:
        b.refuse("the native engine has the mean over both image dimensions, (2, 3), only", "use engine='torch'")
    pooled = b.add(Kind.GLOBAL_AVG_POOL, input)
    return pooled if keepdim else b.add(Kind.FLATTEN, pooled)


def _flatten(b: _Builder, input: Any, start_dim: int = 0, end_dim: int = -1) -> _Value:
    if start_dim != 1 or end_dim != -1:
        b.refuse(
            f"it flattens dimensions {start_dim} … {end_dim}, and a sample can be flattened as a whole only",
            "flatten from dimension 1 to -1",
        )
    return b.add(Kind.FLATTEN, input)


def _view(b: _Builder, input: Any, *sizes: Any) -> _Value:
    if len(sizes) == 1 and isinstance(sizes[0], (tuple, list)):
        sizes = tuple(sizes[0])
    value = b.value(input)
    if len(sizes) < 2 or not all(isinstance(size, (int, _Batch)) and not isinstance(size, bool) for size in sizes):
        b.refuse(
            "this reshape is not understood: it must keep the samples apart",
            "use x.flatten(1), x.view(x.size(0), -1) or x.view(-1, FEATURES)",
        )
    batch, *sample = sizes
    if isinstance(batch, int) and batch != -1:
        b.refuse(
            f"it fixes the number of samples at {batch}, but support and query sets differ",
            "use x.view(x.size(0), -1) or x.flatten(1)",
        )
    if any(not isinstance(size, int) or (size == -1 and (batch == -1 or len(sample) > 1)) for size in sample):
        b.refuse("this reshape is not understood", "use x.flatten(1) or x.view(x.size(0), -1)")
    if len(sample) == 1:
        whole = b.add(Kind.FLATTEN, value)
        if sample[0] != -1:  # all features of a sample, or samples would be mixed: checked when their shape is known
            b.expect(whole, (sample[0],))
        return whole
    b.expect(value, tuple(sample))  # images as images: a view that changes nothing
    return value


def _unchanged(b: _Builder, input: Any) -> _Value:
    return b.value(input)


def _dropout(b: _Builder, input: Any, p: float = 0.5, training: bool = True, inplace: bool = False) -> _Value:
    if training and p != 0:
        b.refuse(
            f"it drops at random (p={p}, in training mode)",
            "call .eval() on it or use p=0; engine='torch' draws anew at every pass",
        )
    return b.value(input)


def _add(b: _Builder, input: Any, other: Any, *, alpha: Any = 1) -> _Value:
    if alpha != 1:
        b.refuse(f"alpha is {alpha}, and the native engine adds only", "use engine='torch'")
    return b.add(Kind.ADD, input, _summand(b, other))


def _add_in_place(b: _Builder, input: Any, other: Any, *, alpha: Any = 1) -> _Value:
    if alpha != 1:
        b.refuse(f"alpha is {alpha}, and the native engine adds only", "use engine='torch'")
    return b.add(Kind.ADD, input, _summand(b, other), in_place=True)


def _summand(b: _Builder, other: Any) -> Any:
    if not isinstance(other, _Value):
        b.refuse("it adds something that is no layer's output", "use engine='torch'")
    return other


def _shape(b: _Builder, input: Any, dim: int | None = None) -> Any:
    b.value(input)
    if dim is None:
        return _Sizes()
    return _Batch() if dim == 0 else _Size()


def _attribute(b: _Builder, input: Any, name: str) -> Any:
    if name != "shape":
        b.refuse(f"forward reads the tensor's .{name}", "use engine='torch'")
    return _shape(b, input)


def _item(b: _Builder, sizes: Any, index: Any) -> Any:
    if not isinstance(sizes, _Sizes) or not isinstance(index, int):
        b.refuse("indexing is understood on x.shape only", "use engine='torch'")
    return _Batch() if index == 0 else _Size()


def _flatten_module(b: _Builder, module: Any, input: Any) -> _Value:
    return _flatten(b, input, module.start_dim, module.end_dim)


def _max_pool_module(b: _Builder, m: Any, input: Any) -> _Value:
    return _max_pool2d(b, input, m.kernel_size, m.stride, m.padding, m.dilation, m.ceil_mode, m.return_indices)


def _avg_pool_module(b: _Builder, m: Any, input: Any) -> _Value:
    return _avg_pool2d(
        b, input, m.kernel_size, m.stride, m.padding, m.ceil_mode, m.count_include_pad, m.divisor_override
    )


def _dropout_module(b: _Builder, module: Any, input: Any) -> _Value:
    return _dropout(b, input, module.p, module.training)


def _in_place(rule: Callable[..., _Value]) -> Callable[..., _Value]:
    return lambda b, input, *args: rule(b, input, *args, inplace=True)


_MODULES: dict[type[nn.Module], Callable[..., Any]] = {
    nn.Linear: _linear,
    nn.Conv2d: _conv2d,
    nn.BatchNorm1d: _batch_norm(),
    nn.BatchNorm2d: _batch_norm(None, None),
    nn.LayerNorm: _layer_norm,
    nn.GroupNorm: _group_norm,
    nn.ReLU: lambda b, m, input: _relu(b, input, m.inplace),
    nn.LeakyReLU: lambda b, m, input: _leaky_relu(b, input, m.negative_slope, m.inplace),
    nn.GELU: lambda b, m, input: _gelu(b, input, approximate=m.approximate),
    nn.Tanh: lambda b, m, input: _tanh(b, input),
    nn.Sigmoid: lambda b, m, input: _sigmoid(b, input),
    nn.MaxPool2d: _max_pool_module,
    nn.AvgPool2d: _avg_pool_module,
    nn.AdaptiveAvgPool2d: lambda b, m, input: _adaptive_avg_pool2d(b, input, m.output_size),
    nn.Flatten: _flatten_module,
    nn.Identity: lambda b, m, input: _unchanged(b, input),
    nn.Dropout: _dropout_module,
    nn.Dropout1d: _dropout_module,
    nn.Dropout2d: _dropout_module,
    nn.AlphaDropout: _dropout_module,
}

_FUNCTIONS: dict[Any, Callable[..., Any]] = {
    torch.relu: _relu,
    torch.relu_: _in_place(_relu),
    F.relu: _relu,
    F.leaky_relu: _leaky_relu,
    F.gelu: _gelu,
    torch.tanh: _tanh,
    F.tanh: _tanh,
    torch.sigmoid: _sigmoid,
    F.sigmoid: _sigmoid,
    F.max_pool2d: _max_pool2d,
    torch.max_pool2d: _max_pool2d,
    F.avg_pool2d: _avg_pool2d,
    F.adaptive_avg_pool2d: _adaptive_avg_pool2d,
    torch.mean: _mean,
    torch.flatten: _flatten,
    torch.reshape: _view,
    F.dropout: _dropout,
    F.dropout2d: _dropout,
    operator.add: _add,
    operator.iadd: _add_in_place,
    torch.add: _add,
    getattr: _attribute,
    operator.getitem: _item,
}
_FUNCTION_NAMES = {F.max_pool2d: "F.max_pool2d"}  # torch gives it another one

_METHODS: dict[Any, Callable[..., Any]] = {
    "relu": _relu,
    "relu_": _in_place(_relu),
    "tanh": _tanh,
    "sigmoid": _sigmoid,
    "mean": _mean,
    "flatten": _flatten,
    "view": _view,
    "reshape": _view,
    "contiguous": _unchanged,
    "add": _add,
    "add_": _add_in_place,
    "size": _shape,
}


# --- kept for every model -------------------------------------------------------------------------


class Lowered:
    """A model's Program with the places of its tensors, or why there is none; and what engine.py keeps about it. It
    does not keep the model alive.

    Attributes:
        program: None where the model does not lower. error: why it does not.
        names: of the parameters, in the program's order. code: the program's encoding.
        memory: checked inner loops by their arguments. told: what has been said about the model in the log.
    """

    def __init__(self, model: nn.Module) -> None:
        self.program: Program | None = None
        self.error: NotLowerable | None = None
        self.names: tuple[str, ...] = ()
        self.code: list[int] = []
        self.has_running_statistics = False
        self.memory: dict[Any, Any] = {}
        self.told: set[str] = set()
        self._watch = _Watch(model)
        self._global_hooks = bool(torch_module._has_any_global_hook())
        self._outputs: dict[tuple[int, ...], tuple[str | None, int]] = {}
        self._parameters: list[tuple[dict[str, Any], str]] = []
        self._buffers: list[tuple[dict[str, Any], str]] = []
        try:
            self.program = lower(model)
        except NotLowerable as error:
            self.error = copy.copy(error)  # without the traceback, which holds on to the model
            return
        self.names, self.code = self.program.parameters, self.program.encode()
        self._parameters = [_slot(model, name, "_parameters") for name in self.names]
        self._buffers = [_slot(model, name, "_buffers") for name in self.program.buffers]
        norms = [node for node in self.program.nodes if node.kind is Kind.BATCH_NORM]
        self.has_running_statistics = all(node.attributes[1] >= 0 for node in norms)

    def is_current(self) -> bool:
        """Whether the model is still the one that was lowered: the same modules in the same mode with the same
        attributes and hooks."""
        return bool(torch_module._has_any_global_hook()) == self._global_hooks and self._watch.is_unchanged()

    def parameters(self) -> list[Tensor]:
        """The model's own tensors, in the program's order."""
        return [slots[name] for slots, name in self._parameters]

    def buffers(self) -> list[Tensor]:
        """Running statistics, in the program's order."""
        return [slots[name] for slots, name in self._buffers]

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
    global variable) is taken to stay as it is."""
    known = _known.get(model)
    if known is None or not known.is_current():
        with _one_at_a_time:
            known = Lowered(model)
            _known[model] = known
    return known


_known: weakref.WeakKeyDictionary[nn.Module, Lowered] = weakref.WeakKeyDictionary()
_one_at_a_time = threading.Lock()


def _slot(model: nn.Module, name: str, kind: str) -> tuple[dict[str, Any], str]:
    path, _, leaf = name.rpartition(".")
    slots: dict[str, Any] = getattr(model.get_submodule(path), kind)
    return slots, leaf


class _Watch:
    """Notices that a model is no longer what it was, in about a microsecond for each module.

    Tensors are compared by identity: their values may change. The model itself is not kept alive.
    """

    def __init__(self, model: nn.Module) -> None:
        modules = list(model.modules())
        self.attributes = [vars(module) for module in modules]  # numbers, strings; training among them
        self.were = [dict(attributes) for attributes in self.attributes]
        self.hooks = [hooks for module in modules for hooks in (module._forward_hooks, module._forward_pre_hooks)]
        self.hooks += [hooks for module in modules for hooks in (module._backward_hooks, module._backward_pre_hooks)]
        self.members = [
            members for module in modules for members in (module._modules, module._parameters, module._buffers)
        ]
        self.hook_counts = list(map(len, self.hooks))
        self.member_ids = self._member_ids()
        self.kept = [  # so that no other object gets the id of one of these
            tensor for module in modules for tensor in (*module._parameters.values(), *module._buffers.values())
        ]
        standard = vars(nn.Module())
        self.containers = [
            (value, copy.copy(value))
            for attributes in self.attributes
            for name, value in attributes.items()
            if name not in standard and type(value) in (list, dict, set)
        ]

    def _member_ids(self) -> list[int]:
        return [id(member) for members in self.members for member in members.values()]

    def is_unchanged(self) -> bool:
        try:
            return (
                self.attributes == self.were
                and list(map(len, self.hooks)) == self.hook_counts
                and self._member_ids() == self.member_ids
                and self.containers_are_unchanged()
            )
        except (RuntimeError, ValueError, TypeError):  # an attribute that cannot be compared was replaced
            return False

    def containers_are_unchanged(self) -> bool:
        return all(value == before for value, before in self.containers)
