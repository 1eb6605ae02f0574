"""The papers' backbones, by name: ``build(name)(input_shape, outputs, **options)``.

Every builder takes the shape of one sample and the number of outputs, or None for an embedding without a head; its
options are annotated keyword arguments, which the command line offers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from innerloop.registry import nearest

Shape = tuple[int, ...]


Activation = Literal["relu", "sigmoid"]
_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": torch.relu, "sigmoid": torch.sigmoid}


class SimpleModel(nn.Module):
    """Two Linear layers with a ReLU between, on flattened samples: the 784-128-N net of MAML's Omniglot baselines.

    Args:
        inputs: features of a flattened sample. hidden: width. outputs: of the head.
        activation: "relu", or "sigmoid" in its place.
    """

    def __init__(self, inputs: int = 784, hidden: int = 128, outputs: int = 5, activation: Activation = "relu") -> None:
        super().__init__()
        self.inputs = inputs
        self.activation = _ACTIVATIONS[activation]
        self.fc1 = nn.Linear(inputs, hidden)
        self.fc2 = nn.Linear(hidden, outputs)

    def forward(self, x: Tensor) -> Tensor:
        x = x.view(-1, self.inputs)
        x = self.activation(self.fc1(x))
        return self.fc2(x)


def mlp(
    input_shape: Shape = (1, 28, 28), outputs: int | None = 5, *, hidden: int = 128, activation: Activation = "relu"
) -> nn.Module:
    """Two Linear layers with an activation between.

    Args:
        input_shape: of one sample, which is flattened. outputs: of the head; None: no head.
        hidden: width of the hidden layer; without a head, of the embedding.
        activation: "relu" or "sigmoid": with 20 hidden units the net of Andrychowicz et al. 2016, section 3.2.
    """
    if activation not in _ACTIVATIONS:
        raise ValueError(f"activation is {activation!r}.{nearest(str(activation), list(_ACTIVATIONS))}")
    inputs = math.prod(input_shape)
    if outputs is None:
        between = nn.ReLU() if activation == "relu" else nn.Sigmoid()
        return nn.Sequential(nn.Flatten(), nn.Linear(inputs, hidden), between, nn.Linear(hidden, hidden))
    return SimpleModel(inputs, hidden, outputs, activation)


def linear(input_shape: Shape = (10,), outputs: int | None = 1, *, bias: bool = False) -> nn.Module:
    """One Linear layer: on the data set ``quadratic``, θ of the functions of Andrychowicz et al. 2016, section 3.1.

    Args:
        input_shape: of one sample, which is flattened. outputs: of the layer; None: as many as inputs.
        bias: add a vector of biases.
    """
    inputs = math.prod(input_shape)
    return nn.Sequential(nn.Flatten(), nn.Linear(inputs, inputs if outputs is None else outputs, bias=bias))


def sinusoid_mlp(input_shape: Shape = (1,), outputs: int | None = 1, *, hidden: int = 40) -> nn.Module:
    """The regression net of Finn et al. 2017, section 5.1: 1-40-40-1 with ReLU.

    Args:
        input_shape: of one sample, (features,). outputs: of the head; None: no head.
        hidden: width of both hidden layers.
    """
    layers = [nn.Linear(math.prod(input_shape), hidden), nn.ReLU(), nn.Linear(hidden, hidden)]
    return nn.Sequential(*layers) if outputs is None else nn.Sequential(*layers, nn.ReLU(), nn.Linear(hidden, outputs))


def conv4(
    input_shape: Shape = (1, 28, 28),
    outputs: int | None = 5,
    *,
    filters: int = 64,
    downsample: Literal["pool", "stride"] = "pool",
    halvings: int = 4,
) -> nn.Module:
    """Four blocks of 3×3 convolution, BatchNorm, ReLU and downsampling (Vinyals et al. 2016, section 4.1.1).

    Without a head its outputs are feature maps [N, filters, height, width].

    Args:
        input_shape: (channels, height, width) of one sample. outputs: of the head, a Linear layer; None: no head.
        filters: channels of every block: 64 for Omniglot, 32 for miniImageNet in Finn et al. 2017.
        downsample: "pool" is a 2×2 max-pool after each block; "stride" a stride of 2 in the convolution, as in
            Finn et al. 2017 on Omniglot.
        halvings: how many of the blocks downsample, the first ones: 2 in Sung et al. 2018.
    """
    if not 0 <= halvings <= 4:
        raise ValueError(f"halvings is {halvings}, expected 0 … 4: there are four blocks")
    channels, height, width = input_shape
    blocks: list[nn.Module] = []
    for block in range(4):
        halves = block < halvings
        stride = 2 if halves and downsample == "stride" else 1
        blocks += [nn.Conv2d(channels, filters, 3, stride=stride, padding=1), nn.BatchNorm2d(filters), nn.ReLU()]
        if halves and downsample == "pool":
            blocks.append(nn.MaxPool2d(2))
        channels = filters
        if halves:
            height, width = ((n + 1) // 2 if downsample == "stride" else n // 2 for n in (height, width))
    if height * width == 0:
        smallest = 2**halvings
        raise ValueError(f"input_shape is {input_shape}, expected at least {smallest} × {smallest} pixels to halve")
    if outputs is not None:
        blocks += [nn.Flatten(), nn.Linear(filters * height * width, outputs)]
    return nn.Sequential(*blocks)


def output_shape(model: nn.Module, input_shape: Shape) -> Shape:
    """The shape of a model's output for one sample; the model is run once, in eval mode, on zeros."""
    like = next(model.parameters(), torch.empty(0))
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            return tuple(model(like.new_zeros(1, *input_shape)).shape[1:])
    finally:
        for module, training in modes:
            module.training = training


BUILDERS: dict[str, Callable[..., nn.Module]] = {
    "conv4": conv4,
    "linear": linear,
    "mlp": mlp,
    "sinusoid_mlp": sinusoid_mlp,
}


def build(name: str) -> Callable[..., nn.Module]:
    """The builder of that name: (input_shape, outputs, **options) → nn.Module.

    Raises:
        LookupError: no such name; the message has the nearest matches and the list.

    Examples:
        >>> model = innerloop.models.build("conv4")((1, 28, 28), outputs=5, filters=32)
        >>> model(torch.rand(10, 1, 28, 28)).shape
        torch.Size([10, 5])
    """
    if name not in BUILDERS:
        raise LookupError(f"no model is called {name!r}.{nearest(name, sorted(BUILDERS))}")
    return BUILDERS[name]
