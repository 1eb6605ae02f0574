"""A lowered network: the list of layers that the native engine runs, and its encoding as integers.

A Program is about one sample: a value is a vector [F], an image [C, H, W], or a sequence [C, L] that may only be
flattened. It fixes no shape; :meth:`Program.shapes` says what every value becomes for samples of a shape.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Container, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from itertools import islice

FORMAT = 1

Shape = tuple[int, ...]


class Kind(IntEnum):
    """What a node computes; csrc/program/program.h has the same numbers."""

    LINEAR = 0  # attributes: none
    CONV2D = 1  # stride (h, w), padding (h, w)
    BATCH_NORM = 2  # eps, buffer of the running mean, buffer of the running variance (-1: none)
    LAYER_NORM = 3  # eps; over the whole sample
    GROUP_NORM = 4  # eps, groups
    RELU = 5
    LEAKY_RELU = 6  # slope
    GELU = 7  # 0 by erf, 1 by tanh
    TANH = 8
    SIGMOID = 9
    MAX_POOL = 10  # kernel (h, w), stride (h, w), padding (h, w)
    AVG_POOL = 11  # the same, whether padding counts
    GLOBAL_AVG_POOL = 12  # to [C, 1, 1]
    FLATTEN = 13  # to [C·H·W]
    ADD = 14  # two values of one shape


@dataclass(frozen=True)
class Node:
    """One layer.

    Attributes:
        kind: what it computes.
        inputs: the values it reads: 0 is the network's input, i + 1 the output of node i.
        parameters: weight and bias, as places in Program.parameters; -1: it has none.
        attributes: of its kind; a float stands for itself here and is encoded by its bits.
        where: the layer as a user finds it: a module's path, or the code of a function.
    """

    kind: Kind
    inputs: tuple[int, ...]
    parameters: tuple[int, ...] = ()
    attributes: tuple[int | float, ...] = ()
    where: str = field(default="", compare=False)


@dataclass(frozen=True)
class Expectation:
    """A shape that the model's code asks of a value: ``x.view(-1, 784)``, a BatchNorm2d of 64 channels.

    Attributes:
        value: which. sizes: of a sample; None is any size. where: the code.
    """

    value: int
    sizes: tuple[int | None, ...]
    where: str = field(default="", compare=False)

    def check(self, shape: Shape) -> None:
        fits = len(shape) == len(self.sizes) and all(
            expected in (None, size) for expected, size in zip(self.sizes, shape, strict=True)
        )
        if not fits:
            names = {1: ("F",), 3: ("C", "H", "W")}.get(len(self.sizes), ("·",) * len(self.sizes))
            spelled = ", ".join(
                name if size is None else str(size) for name, size in zip(names, self.sizes, strict=True)
            )
            raise ValueError(f"{self.where} meets samples of shape {list(shape)}, expected [{spelled}]")


@dataclass(frozen=True)
class Cost:
    """What one task costs at least.

    Attributes:
        flops: floating-point operations of the matrix products and convolutions, a multiply-add counting two.
        numbers: the most floating-point numbers that a thread keeps for it: parameters of every step, values and their
            derivatives. The native engine's fused layers keep fewer.
    """

    flops: int
    numbers: int


#: Numbers of support passes kept beside each other; more are repeated (csrc/engine/pass_memory.h).
_MOST_KEPT = 2**28 // 4


@dataclass(frozen=True)
class Program:
    """A network as the native engine runs it.

    Attributes:
        nodes: in an order in which every value is made before it is read.
        output: the value that is the network's output.
        parameters: names as model.named_parameters() gives them; those the network does not use are left out.
        parameter_shapes: of one task's.
        buffers: names of the running statistics.
        expectations: on values; they are not encoded, and checked by shapes().
    """

    nodes: tuple[Node, ...]
    output: int
    parameters: tuple[str, ...]
    parameter_shapes: tuple[Shape, ...]
    buffers: tuple[str, ...]
    expectations: tuple[Expectation, ...] = ()

    def encode(self) -> list[int]:
        """The integers that csrc/program decodes: [format, numbers of nodes, parameters and buffers, output value],
        then for every node its kind and, each after its count, inputs, parameters and attributes."""
        code = [FORMAT, len(self.nodes), len(self.parameters), len(self.buffers), self.output]
        for node in self.nodes:
            code.append(int(node.kind))
            for part in (node.inputs, node.parameters, [_bits(number) for number in node.attributes]):
                code += [len(part), *part]
        return code

    def shapes(self, sample: Shape) -> list[Shape]:
        """The shape of every value for samples of a shape.

        Raises:
            ValueError: a layer cannot read what it is given; the message names the layer.
        """
        values = [tuple(sample)]
        for node in (None, *self.nodes):
            if node is not None:
                values.append(self._output_shape(node, [values[index] for index in node.inputs]))
            for expectation in self.expectations:
                if expectation.value == len(values) - 1:
                    expectation.check(values[-1])
        if len(values[self.output]) != 1:
            raise ValueError(
                f"the model's outputs have shape {list(values[self.output])} for samples of shape {list(sample)}, "
                "expected a vector: flatten them, or take engine='torch' where each place of a map has a target"
            )
        return values

    def cost(
        self,
        sample: Shape,
        support: int,
        query: int,
        steps: int,
        first_order: bool = False,
        adapted: Container[str] | None = None,
    ) -> Cost:
        """What a task of that many samples and inner steps costs.

        Counted are K passes forward and backward over the support set, one over the query set, and for the second
        order K Hessian-vector products, in which a product of two becomes two products. What lies below all that is
        adapted is passed once: forward, and for the second order backward.

        Args:
            adapted: names of the parameters that the inner loop adapts; None: all.
        """
        values = self.shapes(sample)
        moving = [p for p, name in enumerate(self.parameters) if adapted is None or name in adapted]
        flops = 0
        for index, node in enumerate(self.nodes):
            if node.kind not in (Kind.LINEAR, Kind.CONV2D):
                continue
            product = 2 * math.prod(self.parameter_shapes[node.parameters[0]]) * math.prod(values[index + 1][1:])
            trained = any(self._depends_on(value, range(len(self.parameters))) for value in node.inputs)
            below = any(self._depends_on(value, moving) for value in node.inputs)
            own = node.parameters[0] in moving
            whole = 3 if trained else 2  # forward, the weight's gradient, and the input's unless it is data
            if below or self._depends_on(index + 1, moving):
                passes = steps * (1 + own + below)
                # The tangents: of the output, of the weight's gradient, of the input's.
                hessian = steps * ((own + below) + (1 + below) + trained * (1 + own))
            else:
                passes, hessian = min(steps, 1), min(steps, 1) * (whole - 1)
            flops += product * (support * (passes + (0 if first_order else hessian)) + query * whole)
        theta = sum(map(math.prod, self.parameter_shapes))
        theta_of_steps = steps * sum(math.prod(self.parameter_shapes[p]) for p in moving)
        activations = sum(math.prod(shape) for shape in values)
        derivatives = 2 if first_order else 4  # value and gradient, and their tangents
        passes = activations * (support * derivatives + query * 2)
        other_steps = 0 if first_order else min(max(steps - 1, 0) * activations * support * 2, _MOST_KEPT)
        return Cost(flops, theta_of_steps + 4 * theta + passes + other_steps)

    def _depends_on(self, value: int, parameters: Container[int]) -> bool:
        if value == 0:
            return False
        node = self.nodes[value - 1]
        return any(p in parameters for p in node.parameters) or any(
            self._depends_on(read, parameters) for read in node.inputs
        )

    def _output_shape(self, node: Node, inputs: Sequence[Shape]) -> Shape:
        shape = inputs[0]
        if node.kind is Kind.FLATTEN:
            return (math.prod(shape),)
        if len(shape) not in (1, 3):
            raise _misfit(node, shape, "a vector [F] or an image [C, H, W]")
        weight = self.parameter_shapes[node.parameters[0]] if node.parameters and node.parameters[0] >= 0 else ()
        if node.kind is Kind.LINEAR:
            if shape != weight[1:]:
                raise _misfit(node, shape, f"[{weight[1]}]")
            return weight[:1]
        if node.kind is Kind.CONV2D:
            if len(shape) != 3 or shape[0] != weight[1]:
                raise _misfit(node, shape, f"[{weight[1]}, H, W]")
            return (weight[0], *_windows(node, shape, weight[2:], node.attributes[:2], node.attributes[2:]))
        if node.kind is Kind.GROUP_NORM:
            groups = int(node.attributes[1])
            if (weight and shape[0] != weight[0]) or shape[0] % groups:
                raise _misfit(node, shape, f"{weight[0] if weight else f'a multiple of {groups}'} channels")
        if node.kind in (Kind.MAX_POOL, Kind.AVG_POOL, Kind.GLOBAL_AVG_POOL) and len(shape) != 3:
            raise _misfit(node, shape, "an image [C, H, W]")
        if node.kind in (Kind.MAX_POOL, Kind.AVG_POOL):
            kernel, stride, padding = (node.attributes[start : start + 2] for start in (0, 2, 4))
            return (shape[0], *_windows(node, shape, kernel, stride, padding))
        if node.kind is Kind.GLOBAL_AVG_POOL:
            return (shape[0], 1, 1)
        if node.kind is Kind.ADD and inputs[1] != shape:
            raise ValueError(f"{node.where} adds {list(shape)} and {list(inputs[1])}, expected one shape")
        return shape

    def __str__(self) -> str:
        """A line for each node: value, what makes it, its parameters and attributes, and the layer it was."""
        rows = []
        for index, node in enumerate(self.nodes):
            read = [f"v{value}" if value else "x" for value in node.inputs]
            read += [self.parameters[place] for place in node.parameters if place >= 0]
            read += self._attribute_texts(node)
            rows.append((f"v{index + 1}", f"{node.kind.name.lower()}({', '.join(read)})", node.where))
        widths = [max(len(row[column]) for row in rows) for column in range(2)]
        lines = [f"{row[0]:{widths[0]}} = {row[1]:{widths[1]}}  # {row[2]}" for row in rows]
        return "\n".join([*lines, f"return v{self.output}"])

    def _attribute_texts(self, node: Node) -> list[str]:
        names = _ATTRIBUTES.get(node.kind, ())
        texts = []
        for name, start, count in names:
            numbers = node.attributes[start : start + count]
            if name in ("running_mean", "running_var"):
                if numbers[0] >= 0:
                    texts.append(self.buffers[int(numbers[0])])
            else:
                texts.append(f"{name}=" + "x".join(f"{number:g}" for number in numbers))
        return texts


_ATTRIBUTES = {
    Kind.CONV2D: (("stride", 0, 2), ("padding", 2, 2)),
    Kind.BATCH_NORM: (("running_mean", 1, 1), ("running_var", 2, 1), ("eps", 0, 1)),
    Kind.LAYER_NORM: (("eps", 0, 1),),
    Kind.GROUP_NORM: (("groups", 1, 1), ("eps", 0, 1)),
    Kind.LEAKY_RELU: (("slope", 0, 1),),
    Kind.GELU: (("tanh", 0, 1),),
    Kind.MAX_POOL: (("kernel", 0, 2), ("stride", 2, 2), ("padding", 4, 2)),
    Kind.AVG_POOL: (("kernel", 0, 2), ("stride", 2, 2), ("padding", 4, 2), ("count_include_pad", 6, 1)),
}


def _bits(number: int | float) -> int:
    """An integer as it is; a float as the integer of its bits."""
    if isinstance(number, int):
        return number
    (bits,) = struct.unpack("<q", struct.pack("<d", number))
    return int(bits)


def _windows(
    node: Node, shape: Shape, kernel: Sequence[float], stride: Sequence[float], padding: Sequence[float]
) -> Shape:
    """Height and width of the output of a convolution or pooling."""
    if min(stride) < 1:
        raise ValueError(f"{node.where} has a stride of {int(stride[0])} × {int(stride[1])}, expected at least 1")
    sizes = [
        (int(size) + 2 * int(pad) - int(width)) // int(step) + 1
        for size, width, step, pad in zip(shape[1:], kernel, stride, padding, strict=True)
    ]
    if min(sizes) < 1:
        raise ValueError(
            f"{node.where} has a window of {int(kernel[0])} × {int(kernel[1])}, which does not fit into "
            f"its input {list(shape)}"
        )
    return tuple(sizes)


def _misfit(node: Node, shape: Shape, expected: str) -> ValueError:
    return ValueError(f"{node.where} meets samples of shape {list(shape)}, expected {expected}")


def decoded_outputs(code: Sequence[int], sample: Shape, parameter_shapes: Sequence[Shape]) -> int:
    """The number of outputs of an encoded program, for samples of a shape. parameter_shapes: see
    :func:`decoded_parameters`."""
    nodes, output = _decoded(code)
    program = Program(nodes, output, (), tuple(decoded_parameters(code, parameter_shapes)), ())
    return program.shapes(sample)[output][0]


def decoded_parameters(code: Sequence[int], parameter_shapes: Sequence[Shape]) -> list[Shape]:
    """The shapes of an encoded program's parameters for one task.

    Args:
        parameter_shapes: of one task's parameters, or with tasks in front.
    """
    shapes = list(parameter_shapes)
    for node in _decoded(code)[0]:
        for place, parameter in enumerate(node.parameters):
            if parameter >= 0:
                dims = _dims(node.kind, place == 0, len(shapes[parameter]))
                shapes[parameter] = shapes[parameter][-dims:]
    return shapes


def _dims(kind: Kind, is_weight: bool, given: int) -> int:
    """Of a parameter for one task; given: those it has. A layer norm's are those of a vector or of an image, 1 or 3."""
    if kind == Kind.LAYER_NORM:
        return given if given % 2 else given - 1
    return {Kind.LINEAR: 2, Kind.CONV2D: 4}.get(kind, 1) if is_weight else 1


def _decoded(code: Sequence[int]) -> tuple[tuple[Node, ...], int]:
    """An encoded program's nodes and its output."""
    numbers = iter(code)

    def take(count: int) -> tuple[int, ...]:
        if not 0 <= count <= len(code):
            raise ValueError(f"program speaks of {count} numbers, and has {len(code)}")
        taken = tuple(islice(numbers, count))
        if len(taken) < count:
            raise ValueError(f"program ends after {len(code)} numbers, in the middle of a node")
        return taken

    _, count, _, _, output = take(5)
    nodes = []
    for _ in range(count):
        number = take(1)[0]
        if number not in set(Kind):
            raise ValueError(f"program has a node of kind {number}, which there is not")
        kind = Kind(number)
        inputs, parameters, attributes = (take(*take(1)) for _ in range(3))
        nodes.append(Node(kind, inputs, parameters, attributes, where=kind.name.lower()))
    return tuple(nodes), output
