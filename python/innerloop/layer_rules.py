"""What each layer of torch becomes in a Program, or why it cannot: a function for each, with torch's signature."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from innerloop.norms import PerStepBatchNorm
from innerloop.program import Kind
from innerloop.program_builder import Batch, Builder, Rules, Size, Sizes, Value


def _pair(value: Any) -> tuple[int, int]:
    if isinstance(value, int):
        return value, value
    if len(value) == 1:
        return value[0], value[0]
    first, second = value
    return first, second


def _linear(b: Builder, module: Any, input: Any) -> Value:
    return b.add(Kind.LINEAR, input, module=module)


def _conv2d(b: Builder, module: Any, input: Any) -> Value:
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


def _eps(b: Builder, module: Any) -> float:
    if not module.eps > 0:
        b.refuse(f"eps is {module.eps}, and the native engine divides by at least a positive one", "use engine='torch'")
    return float(module.eps)


def _batch_norm(*trailing: None) -> Callable[..., Value]:
    def rule(b: Builder, module: Any, input: Any) -> Value:
        return b.add(
            Kind.BATCH_NORM,
            input,
            module=module,
            attributes=(_eps(b, module),),
            buffers=("running_mean", "running_var"),
            reads=(module.num_features, *trailing),
        )

    return rule


def _per_step_batch_norm(b: Builder, module: Any, input: Any) -> Value:
    b.refuse("its γ and β differ between inner steps", "use another bn, or engine='torch'")


def _layer_norm(b: Builder, module: Any, input: Any) -> Value:
    return b.add(
        Kind.LAYER_NORM,
        input,
        module=module,
        attributes=(_eps(b, module),),
        reads=tuple(module.normalized_shape),
    )


def _group_norm(b: Builder, module: Any, input: Any) -> Value:
    return b.add(Kind.GROUP_NORM, input, module=module, attributes=(_eps(b, module), module.num_groups))


def _relu(b: Builder, input: Any, inplace: bool = False) -> Value:
    return b.add(Kind.RELU, input, in_place=inplace)


def _leaky_relu(b: Builder, input: Any, negative_slope: float = 0.01, inplace: bool = False) -> Value:
    return b.add(Kind.LEAKY_RELU, input, attributes=(float(negative_slope),), in_place=inplace)


def _gelu(b: Builder, input: Any, *, approximate: str = "none") -> Value:
    return b.add(Kind.GELU, input, attributes=(int(approximate == "tanh"),))


def _tanh(b: Builder, input: Any) -> Value:
    return b.add(Kind.TANH, input)


def _sigmoid(b: Builder, input: Any) -> Value:
    return b.add(Kind.SIGMOID, input)


def _max_pool2d(
    b: Builder,
    input: Any,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Value:
    if _pair(dilation) != (1, 1):
        b.refuse(f"dilation is {dilation}, and the native engine has dilation=1 only", "use engine='torch'")
    if return_indices:
        b.refuse("return_indices is set", "leave it out, or use engine='torch'")
    _refuse_ceil_mode(b, ceil_mode)
    return b.add(Kind.MAX_POOL, input, attributes=_window(kernel_size, stride, padding))


def _avg_pool2d(
    b: Builder,
    input: Any,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Value:
    if divisor_override is not None:
        b.refuse("divisor_override is set", "leave it out, or use engine='torch'")
    _refuse_ceil_mode(b, ceil_mode)
    return b.add(
        Kind.AVG_POOL, input, attributes=(*_window(kernel_size, stride, padding), int(bool(count_include_pad)))
    )


def _refuse_ceil_mode(b: Builder, ceil_mode: bool) -> None:
    if ceil_mode:
        b.refuse("ceil_mode is set, and the native engine rounds down", "use ceil_mode=False, or engine='torch'")


def _window(kernel_size: Any, stride: Any, padding: Any) -> tuple[int, ...]:
    # torch takes an empty stride for none
    stride = kernel_size if stride is None or stride == () or stride == [] else stride
    return *_pair(kernel_size), *_pair(stride), *_pair(padding)


def _adaptive_avg_pool2d(b: Builder, input: Any, output_size: Any) -> Value:
    if output_size not in (1, (1, 1), [1, 1]):
        b.refuse(
            f"output_size is {output_size}, and the native engine has 1 only", "use 1, AvgPool2d or engine='torch'"
        )
    return b.add(Kind.GLOBAL_AVG_POOL, input)


def _mean(b: Builder, input: Any, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Value:
    dims = sorted(dim) if isinstance(dim, (tuple, list)) else None
    if dims not in ([2, 3], [-2, -1]) or dtype is not None:
        b.refuse("the native engine has the mean over both image dimensions, (2, 3), only", "use engine='torch'")
    pooled = b.add(Kind.GLOBAL_AVG_POOL, input)
    return pooled if keepdim else b.add(Kind.FLATTEN, pooled)


def _flatten(b: Builder, input: Any, start_dim: int = 0, end_dim: int = -1) -> Value:
    if start_dim != 1 or end_dim != -1:
        b.refuse(
            f"it flattens dimensions {start_dim} … {end_dim}, and a sample can be flattened as a whole only",
            "flatten from dimension 1 to -1",
        )
    return b.add(Kind.FLATTEN, input)


def _view(b: Builder, input: Any, *sizes: Any) -> Value:
    if len(sizes) == 1 and isinstance(sizes[0], (tuple, list)):
        sizes = tuple(sizes[0])
    value = b.value(input)
    if len(sizes) < 2 or not all(isinstance(size, (int, Batch)) and not isinstance(size, bool) for size in sizes):
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


def _unchanged(b: Builder, input: Any) -> Value:
    return b.value(input)


def _dropout(b: Builder, input: Any, p: float = 0.5, training: bool = True, inplace: bool = False) -> Value:
    if training and p != 0:
        b.refuse(
            f"it drops at random (p={p}, in training mode)",
            "call .eval() on it or use p=0; engine='torch' draws anew at every pass",
        )
    return b.value(input)


def _add(b: Builder, input: Any, other: Any, *, alpha: Any = 1) -> Value:
    if alpha != 1:
        b.refuse(f"alpha is {alpha}, and the native engine adds only", "use engine='torch'")
    return b.add(Kind.ADD, input, _summand(b, other))


def _add_in_place(b: Builder, input: Any, other: Any, *, alpha: Any = 1) -> Value:
    if alpha != 1:
        b.refuse(f"alpha is {alpha}, and the native engine adds only", "use engine='torch'")
    return b.add(Kind.ADD, input, _summand(b, other), in_place=True)


def _summand(b: Builder, other: Any) -> Any:
    if not isinstance(other, Value):
        b.refuse("it adds something that is no layer's output", "use engine='torch'")
    return other


def _shape(b: Builder, input: Any, dim: int | None = None) -> Any:
    b.value(input)
    if dim is None:
        return Sizes()
    return Batch() if dim == 0 else Size()


def _attribute(b: Builder, input: Any, name: str) -> Any:
    if name != "shape":
        b.refuse(f"forward reads the tensor's .{name}", "use engine='torch'")
    return _shape(b, input)


def _item(b: Builder, sizes: Any, index: Any) -> Any:
    if not isinstance(sizes, Sizes) or not isinstance(index, int):
        b.refuse("indexing is understood on x.shape only", "use engine='torch'")
    return Batch() if index == 0 else Size()


def _flatten_module(b: Builder, module: Any, input: Any) -> Value:
    return _flatten(b, input, module.start_dim, module.end_dim)


def _max_pool_module(b: Builder, m: Any, input: Any) -> Value:
    return _max_pool2d(b, input, m.kernel_size, m.stride, m.padding, m.dilation, m.ceil_mode, m.return_indices)


def _avg_pool_module(b: Builder, m: Any, input: Any) -> Value:
    return _avg_pool2d(
        b, input, m.kernel_size, m.stride, m.padding, m.ceil_mode, m.count_include_pad, m.divisor_override
    )


def _dropout_module(b: Builder, module: Any, input: Any) -> Value:
    return _dropout(b, input, module.p, module.training)


def _in_place(rule: Callable[..., Value]) -> Callable[..., Value]:
    return lambda b, input, *args: rule(b, input, *args, inplace=True)


RULES = Rules(
    modules={
        nn.Linear: _linear,
        nn.Conv2d: _conv2d,
        nn.BatchNorm1d: _batch_norm(),
        nn.BatchNorm2d: _batch_norm(None, None),
        PerStepBatchNorm: _per_step_batch_norm,
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
    },
    functions={
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
    },
    methods={
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
    },
)
