"""The workloads of innerloop.bench, and two whose net belongs to the tests."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

from torch import nn

import innerloop.bench.workloads as package
from innerloop.bench.workloads import Workload
from innerloop.models import Shape


def resnet12(input_shape: Shape, outputs: int) -> nn.Module:
    """MetaOptNet's, for 5 classes of 3 × 84 × 84."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    from resnet12 import ResNet12

    return ResNet12()


RESNET12 = Workload(
    *("resnet12-k1", "ResNet-12 84×84", f"{__name__}:resnet12", (3, 84, 84), 5, 1, 25, 5, 1, 0.01), group="torch"
)
WORKLOADS = {
    **package.WORKLOADS,
    "resnet12-k1": RESNET12,
    "resnet12-t2": replace(RESNET12, name="resnet12-t2", tasks=2),
}
