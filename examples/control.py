"""Control: a model of a pendulum never seen, from ten of its transitions and one gradient step.

Every task is a pendulum of its own mass, length, gravity and damping, none of which the network is told: it predicts
the next state from state and torque, for a controller to plan with. MAML trains it so that one gradient step on ten
transitions fits it to the pendulum at hand. The floors: the same network trained on all pendulums together, as it is,
and with one such step (of the size that suits it best).

The error is the mean squared error of the change of angle and of angular velocity over 0.1 s, each divided by its
standard deviation over all transitions. The ranges below were chosen so that joint training is left with about 7 % of
the variance: what no single model of all pendulums can know.

On your own system: log (state, action, next state) of many variants, such as a simulator with random parameters, and
make a TaskBatch of them with a variant for each task. `algorithm.adapt(x, y)` with a few transitions of the real system
is its model. A system outside the ranges that were trained on is not adapted to: draw them wide.

    python examples/control.py              # three seeds; half a minute of one core each
"""

from __future__ import annotations

import argparse
import math

import numpy as np
import torch
from torch import Tensor, nn

import innerloop
from innerloop.training import TrainingSettings

# Smallest and largest mass (kg), length (m), gravity (m/s²), damping (N·m·s); largest angle, angular velocity, torque.
LOW, HIGH = torch.tensor([0.5, 0.58, 8.0, 0.0]), torch.tensor([1.5, 1.5, 11.0, 0.3])
LARGEST = torch.tensor([math.pi, 6.0, 4.0])
DEVIATION = torch.tensor([0.346, 0.803])  # of the changes of angle and of angular velocity


def after(angle: Tensor, velocity: Tensor, torque: Tensor, pendulums: Tensor, seconds: float = 0.1) -> list[Tensor]:
    """Angles and angular velocities [T, N] a moment later, of the pendulums [T, 4]."""
    mass, length, gravity, damping = pendulums[:, None].unbind(-1)
    for _ in range(10):
        acceleration = (torque - damping * velocity) / (mass * length**2) - gravity / length * angle.sin()
        velocity = velocity + acceleration * seconds / 10
        angle = angle + velocity * seconds / 10
    return [angle, velocity]


class Pendulums(innerloop.Dataset):
    """Each task is a random pendulum; a sample is a random state with a random torque, and what they lead to."""

    input_shape, target_shape = (4,), (2,)

    def __init__(self, part: str = "train") -> None:
        self.part = part

    def split(self, name: str) -> Pendulums:
        return Pendulums(name)

    def sample(
        self, tasks: int, ways: int, shots: int, queries: int, seed: int, first_task: int = 0
    ) -> innerloop.TaskBatch:
        # A stream of random numbers for each task, so that it is the same task in whatever batch it is drawn.
        key = [seed, ["train", "val", "test"].index(self.part)]
        streams = [np.random.Philox(key=key, counter=[0, 0, 0, first_task + task]) for task in range(tasks)]
        drawn = np.stack([np.random.Generator(stream).random(4 + 3 * (shots + queries)) for stream in streams])
        of_pendulum, of_samples = torch.from_numpy(drawn).float().split([4, 3 * (shots + queries)], dim=1)
        states = LARGEST * (2 * of_samples.unflatten(1, (-1, 3)) - 1)
        angle, velocity, torque = states.unbind(-1)
        then = after(angle, velocity, torque, LOW + (HIGH - LOW) * of_pendulum)
        x = torch.stack((angle.sin(), angle.cos(), velocity / 3, torque / 2), dim=2)
        y = (torch.stack(then, dim=2) - states[..., :2]) / DEVIATION
        return innerloop.TaskBatch(x[:, :shots], y[:, :shots], x[:, shots:], y[:, shots:])


def train(inner_steps: int, seed: int, steps: int) -> innerloop.Algorithm:
    """MAML with that many inner steps; with none it is joint training."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 2))
    algorithm = innerloop.get("maml")(model, inner_lr=0.1, inner_steps=inner_steps)
    settings = TrainingSettings(steps, meta_batch_size=25, shots=10, queries=10, schedule="cosine", seed=seed)
    innerloop.fit(algorithm, Pendulums().split("train"), settings=settings)
    return algorithm


def error(algorithm: innerloop.Algorithm, inner_steps: int, part: str = "test") -> float:
    tasks = Pendulums().split(part)
    return innerloop.evaluate(algorithm, tasks, shots=10, queries=40, inner_steps=inner_steps).mean


def run(seed: int, steps: int = 3000) -> dict[str, float]:
    """Mean squared errors on 600 test pendulums."""
    joint = train(0, seed, steps)
    found = {"joint training": error(joint, 0)}
    by_size = {}
    for size in (0.01, 0.03, 0.1, 0.2):
        joint.inner_lr = size
        by_size[error(joint, 1, "val")] = size
    joint.inner_lr = by_size[min(by_size)]
    found["joint training, then one step"] = error(joint, 1)
    found["MAML, one step"] = error(train(1, seed, steps), 1)
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="A pendulum's dynamics from ten transitions: mean squared errors.")
    parser.add_argument("--seeds", type=int, default=3, help="trainings, each from another seed")
    parser.add_argument("--steps", type=int, default=3000, help="outer steps of a training")
    options = parser.parse_args()
    results = [run(seed, options.steps) for seed in range(options.seeds)]
    for name in results[0]:
        values = torch.tensor([result[name] for result in results])
        print(f"{name}: {values.mean():.4f} ± {values.std(correction=0):.4f}")
