"""Segmentation: which pixels belong to which of two letters never seen, learned from three labelled canvases.

A task is two letters. On each canvas both stand somewhere, by different hands, and every pixel has a label: 0 the
background, 1 the first letter, 2 the second. A fully convolutional network gives a logit for each label and pixel, and
MAML adapts it to the task's three labelled canvases. All that differs from classification are labels [S, H, W] for
outputs [S, 3, H, W], and a loss that weighs the background less. Test letters are of scripts never trained on.

The figure is the mean intersection over union of the three labels, over the unlabelled canvases of a task. Floors: the
background alone; and the same network, trained as long with no adaptation, which finds the ink but cannot know which
letter is called which.

On your own images: a task is a few images with masks and some without, `TaskBatch(images [T, S, C, H, W], masks
[T, S, H, W], ...)`; any segmentation network will do, for any module takes the torch engine. Count on some dozens of
kinds of objects to train on, and on second derivatives of large images taking memory: `first_order=True` needs less.

    python examples/segmentation.py         # three seeds; a minute of one core each
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import innerloop
from innerloop.training import TrainingSettings

SIZE = 16  # of a quarter of the canvas; a letter stands in one
SHOTS, QUERIES = 3, 3  # canvases of a task with labels, and without
# Nine pixels of ten are background: of full weight they would leave little of the gradient to the letters.
LOSS = nn.CrossEntropyLoss(weight=torch.tensor([0.1, 1.0, 1.0]))


class Canvases(innerloop.Dataset):
    """Tasks of canvases with two letters; shots and queries count canvases."""

    input_shape = (1, 2 * SIZE, 2 * SIZE)

    def __init__(self, letters: innerloop.Dataset | None = None) -> None:
        self.letters = letters or innerloop.data.get("glyphs")

    def split(self, name: str) -> Canvases:
        return Canvases(self.letters.split(name))

    def sample(
        self, tasks: int, ways: int, shots: int, queries: int, seed: int, first_task: int = 0
    ) -> innerloop.TaskBatch:
        drawn = self.letters.sample(tasks, 2, shots, queries, seed, first_task)
        canvases = []
        for number in range(tasks):  # each with random numbers of its own, so that it is the same in any batch
            generator = torch.Generator().manual_seed(1_000_003 * seed + first_task + number)
            letters = (drawn.support_x[number], drawn.query_x[number])
            canvases.append([tensor for samples in letters for tensor in compose(samples, generator)])
        return innerloop.TaskBatch(*(torch.stack(tensors) for tensors in zip(*canvases, strict=True)))


def compose(letters: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Canvases [N, 1, H, W] with their labels [N, H, W], from N samples of one letter and then N of another."""
    small = F.avg_pool2d(letters, 2).unflatten(0, (2, -1))[:, :, 0].transpose(0, 1)  # [N, 2, 14, 14]
    count = len(small)
    quarters = torch.rand(count, 4, generator=generator).argsort(dim=1)[:, :2, None, None]
    down, right = torch.randint(3, (2, count, 2, 1, 1), generator=generator)
    rows = SIZE * (quarters // 2) + down + torch.arange(14)[:, None]
    columns = SIZE * (quarters % 2) + right + torch.arange(14)
    place = (torch.arange(count)[:, None, None, None], rows, columns)
    images = torch.zeros(count, 2 * SIZE, 2 * SIZE)
    labels = torch.zeros(images.shape, dtype=torch.int64)
    images[place] = small
    labels[place] = (small > 0.4) * torch.tensor([1, 2])[:, None, None]
    return images[:, None], labels


class Network(nn.Module):
    """A small U-Net: what a place is part of, seen at a quarter of the resolution, and then the ink of each pixel."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inputs, stride in ((1, 2), (width, 2), (width, 1)):
            layers += [nn.Conv2d(inputs, width, 3, stride, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
        self.encoder = nn.Sequential(*layers, nn.Upsample(scale_factor=4, mode="bilinear"))
        self.decoder = nn.Sequential(nn.Conv2d(width + 1, width, 1), nn.ReLU(), nn.Conv2d(width, 3, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(torch.cat((self.encoder(x), x), dim=1))


def mean_iou(predicted: Tensor, labels: Tensor) -> float:
    """Mean over tasks and labels of the intersection over union, of [T, Q, H, W] both."""
    ious = []
    for label in range(3):
        ours, theirs = predicted == label, labels == label
        ious.append((ours & theirs).flatten(1).sum(1) / (ours | theirs).flatten(1).sum(1))
    return float(torch.stack(ious).mean())


def train(inner_steps: int, seed: int, steps: int) -> innerloop.Algorithm:
    torch.manual_seed(seed)
    # Maps of labels take the torch engine: said here, so that no log line does.
    algorithm = innerloop.get("maml")(Network(), inner_lr=1.0, inner_steps=inner_steps, loss=LOSS, engine="torch")
    settings = TrainingSettings(
        steps, meta_batch_size=4, shots=SHOTS, queries=QUERIES, schedule="cosine", seed=seed, lr=3e-3
    )
    innerloop.fit(algorithm, Canvases().split("train"), settings=settings)
    return algorithm.eval()


def run(seed: int, steps: int = 250) -> dict[str, float]:
    """Mean intersections over union, in percent, on 100 test tasks."""
    tasks = Canvases().split("test").sample(100, 2, SHOTS, QUERIES, seed=0)
    found = {"background only": 100 * mean_iou(torch.zeros_like(tasks.query_y), tasks.query_y)}
    for name, inner_steps in (("no adaptation", 0), ("MAML", 2)):
        algorithm = train(inner_steps, seed, steps)
        with torch.no_grad():
            found[name] = 100 * mean_iou(algorithm(tasks).logits.argmax(dim=2), tasks.query_y)
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Segmentation of two letters from three canvases: mean IoU.")
    parser.add_argument("--seeds", type=int, default=3, help="trainings, each from another seed")
    parser.add_argument("--steps", type=int, default=250, help="outer steps of a training")
    options = parser.parse_args()
    results = [run(seed, options.steps) for seed in range(options.seeds)]
    for name in results[0]:
        values = torch.tensor([result[name] for result in results])
        print(f"{name}: {values.mean():.1f} ± {values.std(correction=0):.1f}")
