"""MetaOptNet's ResNet-12 (Lee et al. 2019), written as its authors' code is."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn


class Block(nn.Module):
    """Three 3×3 convolutions beside a 1×1 shortcut, and a 2×2 max-pool."""

    def __init__(self, inputs: int, outputs: int, drop_rate: float) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.relu = nn.LeakyReLU(0.1)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.conv3 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.maxpool = nn.MaxPool2d(2)
        self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, bias=False), nn.BatchNorm2d(outputs))
        self.drop_rate = drop_rate
        self.num_batches_tracked = 0

    def forward(self, x: Tensor) -> Tensor:
        self.num_batches_tracked += 1
        residual = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        residual = self.downsample(x)
        out += residual
        out = self.maxpool(self.relu(out))
        if self.drop_rate > 0:
            out = F.dropout(out, p=self.drop_rate, training=self.training, inplace=True)
        return out


class ResNet12(nn.Module):
    """Embedding and linear head; 84 × 84 images with the paper's channels."""

    def __init__(self, channels: Sequence[int] = (64, 160, 320, 640), outputs: int = 5, drop_rate: float = 0.0) -> None:
        super().__init__()
        sizes = [3, *channels]
        self.layer1, self.layer2, self.layer3, self.layer4 = (
            Block(inputs, size, drop_rate) for inputs, size in pairwise(sizes)
        )
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(sizes[-1], outputs)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        x = self.avgpool(x)
        x = x.view(x.size(0), -1)
        return self.head(x)
