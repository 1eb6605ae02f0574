"""Labelling images from a few labelled ones: what a trained few-shot learner is for."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from innerloop.contract import Algorithm, Dataset
from innerloop.data.images import class_folders, image_files, read_image

Invert = Literal["auto", "yes", "no"]

JUDGED_TOGETHER = 256  # queries of one forward pass: it bounds memory, and what "transductive" takes statistics of


@dataclass(frozen=True)
class LabelledImage:
    """What a learner says of one image: its label, the second choice, and the probability of each."""

    path: Path
    label: str
    confidence: float
    second: str
    second_confidence: float


@dataclass(frozen=True)
class Labelling:
    """A folder of images labelled from a support set.

    Attributes:
        support: class → its labelled images. images: the queries, in the order of their names.
        inverted: whether light and dark were exchanged in all images to match what the learner was trained on.
    """

    support: dict[str, list[Path]]
    images: list[LabelledImage]
    inverted: bool


def label_images(
    algorithm: Algorithm,
    trained_on: Dataset,
    support: Path,
    query: Path,
    *,
    ways: int | None = None,
    invert: Invert = "auto",
) -> Labelling:
    """Adapt to the classes of one folder and label the images of another.

    Images are made grey or RGB and stretched to the shape of the training data's samples. Queries are judged up to
    256 at a time; with ``bn="transductive"`` those share BatchNorm statistics, so that a label may depend on them.

    Args:
        algorithm: trained, in eval mode.
        trained_on: its training data.
        support: folder with a folder of images for each class.
        query: folder of images.
        ways: classes that the algorithm's head tells apart; None: it has none, and takes any number.
        invert: exchange light and dark. "auto" does where the training data's grey images have a clearly dark border
            and these images a light one (ink is 1 and paper 0 in glyphs), or the other way round.

    Raises:
        ValueError: the algorithm was not trained on images, or the classes are not as many as it takes.
        FileNotFoundError: a folder is missing or holds no images.
    """
    shape = trained_on.input_shape
    if trained_on.target_shape is not None or len(shape) != 3 or shape[0] not in (1, 3):
        raise ValueError(
            f"the run was trained on samples of shape {shape}, expected grey or colour images with classes"
        )
    classes = class_folders(support)
    if len(classes) < 2:
        raise ValueError(f"{support} has one class, {next(iter(classes))!r}; expected at least 2 to choose from")
    if ways is not None and len(classes) != ways:
        raise ValueError(
            f"{support} has {len(classes)} classes, but the run's {type(algorithm).__name__} has a head of {ways}: "
            f"give {ways}, or train with --ways {len(classes)} (embedding methods take any number)"
        )
    labels = torch.tensor([label for label, files in enumerate(classes.values()) for _ in files])
    support_pixels = _read([file for files in classes.values() for file in files], shape)
    query_files = image_files(query)
    query_pixels = _read(query_files, shape)
    inverted = invert == "yes" or (invert == "auto" and _backgrounds_differ(trained_on, support_pixels, query_pixels))

    device = next((parameter.device for parameter in algorithm.parameters()), torch.device("cpu"))
    learner = algorithm.adapt(_to_input(support_pixels, inverted).to(device), labels.to(device))
    queries = _to_input(query_pixels, inverted).to(device)
    with torch.no_grad():
        parts = queries.tensor_split(math.ceil(len(queries) / JUDGED_TOGETHER))
        logits = torch.cat([learner(part) for part in parts]).cpu()
    names = list(classes)
    confidences, best = logits.softmax(dim=1).topk(2)
    images = [
        LabelledImage(path, names[first], confidence, names[second], second_confidence)
        for path, (first, second), (confidence, second_confidence) in zip(
            query_files, best.tolist(), confidences.tolist(), strict=True
        )
    ]
    return Labelling(classes, images, inverted)


def shown_name(path: Path) -> str:
    """A file's name as text, whatever bytes it is made of."""
    return os.fsencode(path.name).decode("utf-8", errors="replace")


def _read(files: Sequence[Path], shape: tuple[int, ...]) -> npt.NDArray[np.uint8]:
    """[N, H, W, C]"""
    channels, height, width = shape
    images = np.stack([read_image(file, colour=channels == 3, size=(height, width)) for file in files])
    return images.reshape(len(files), height, width, channels)


def _to_input(pixels: npt.NDArray[np.uint8], inverted: bool) -> Tensor:
    """[N, C, H, W] in 0 … 1, as ClassDataset.to_input makes them."""
    tensor = torch.from_numpy(255 - pixels if inverted else pixels).permute(0, 3, 1, 2)
    return tensor.to(torch.float32).div_(255)


def _backgrounds_differ(trained_on: Dataset, *pixels: npt.NDArray[np.uint8]) -> bool:
    """Whether grey training images have a clearly dark border and these a light one, or the other way round."""
    if trained_on.input_shape[0] != 1:
        return False
    samples = trained_on.split("train").sample(8, 2, 1, 1, seed=0)
    learned = _border(samples.query_x.flatten(0, 2).numpy())
    given = _border(np.concatenate(pixels)[..., 0] / 255)
    return (learned < 0.25 and given > 0.5) or (learned > 0.75 and given < 0.5)


def _border(images: npt.NDArray[np.floating]) -> float:
    """The median brightness along the edges of images [N, H, W]."""
    edges = (images[:, 0], images[:, -1], images[:, :, 0], images[:, :, -1])
    return float(np.median(np.concatenate([edge.ravel() for edge in edges])))
