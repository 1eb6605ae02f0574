"""Evaluation: the list of episodes, the interval, and what a record tells."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import innerloop
from innerloop import Algorithm, Result, TaskBatch
from innerloop.data.class_dataset import ClassDataset
from innerloop.evaluation import Evaluation, batch_norm_mode, embed, evaluate
from innerloop.models import conv4


def points(classes: int = 12, samples: int = 8, spread: float = 0.6) -> ClassDataset:
    random = np.random.default_rng(0)
    centres = random.standard_normal((classes, 1, 6))
    examples = centres + spread * random.standard_normal((classes, samples, 6))
    names = [str(index) for index in range(classes)]
    return ClassDataset(examples.reshape(-1, 6).astype(np.float32), [samples] * classes, names)


class Recorder(Algorithm):
    """Answers with the scores that a function gives for a batch, and keeps what it saw."""

    def __init__(self, answer: Callable[[TaskBatch], Tensor]) -> None:
        super().__init__(nn.Identity())
        self.answer = answer
        self.seen: list[TaskBatch] = []
        self.modes: list[tuple[bool, bool]] = []

    def forward(self, tasks: TaskBatch) -> Result:
        self.seen.append(tasks)
        self.modes.append((self.training, torch.is_grad_enabled()))
        return Result.of(self.answer(tasks), tasks.query_y, tasks.query_mask)

    def adapt(self, support_x: Tensor, support_y: Tensor) -> nn.Module:
        raise NotImplementedError


def first_class(tasks: TaskBatch) -> Tensor:
    """Says class 0 of every query."""
    return nn.functional.one_hot(torch.zeros_like(tasks.query_y), tasks.ways).float()


def test_the_list_of_tasks_is_fixed_by_the_seed() -> None:
    data = points()
    runs = []
    for seed in (3, 3, 4):
        algorithm = Recorder(first_class)
        record = evaluate(algorithm, data, ways=3, shots=2, episodes=45, seed=seed, queries=4)
        assert (record.ways, record.shots, record.queries, record.episodes, record.seed) == (3, 2, 4, 45, seed)
        runs.append(torch.cat([batch.query_x for batch in algorithm.seen]))
        assert runs[-1].shape == (45, 3 * 4, 6)
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


def test_more_episodes_begin_with_the_same_ones() -> None:
    data = points()
    few, many = Recorder(first_class), Recorder(first_class)
    evaluate(few, data, ways=2, episodes=7, queries=3)
    evaluate(many, data, ways=2, episodes=50, queries=3)
    together = torch.cat([batch.support_x for batch in many.seen])
    assert torch.equal(together[:7], few.seen[0].support_x)


@pytest.mark.parametrize("target", ["accuracy", "mse"])
def test_mean_and_interval(target: str) -> None:
    """1.96 standard errors of the mean over tasks, by the definition."""
    random = torch.Generator().manual_seed(1)
    x = torch.randn(30, 4, 1, generator=random)
    y = torch.randint(0, 2, (30, 4), generator=random) if target == "accuracy" else x + torch.randn(
        30, 4, 1, generator=random
    )  # fmt: skip
    batches = [TaskBatch(x[start : start + 10], y[start : start + 10], x[start : start + 10], y[start : start + 10])
               for start in (0, 10, 20)]  # fmt: skip
    answer = first_class if target == "accuracy" else lambda tasks: tasks.query_x
    record = evaluate(Recorder(answer), batches)
    scores = (y == 0).double().mean(dim=1) if target == "accuracy" else (y - x).double().square().mean(dim=(1, 2))
    assert record.metric == target
    assert record.higher_is_better is (target == "accuracy")
    assert record.mean == pytest.approx(float(scores.mean()))
    assert record.ci95 == pytest.approx(1.96 * float(scores.std(correction=1)) / math.sqrt(30))
    assert (record.ways, record.shots, record.queries, record.seed) == (None,) * 4


def test_the_algorithm_is_in_eval_mode_without_gradients_and_put_back() -> None:
    algorithm = Recorder(first_class).train()
    evaluate(algorithm, points(), ways=2, episodes=4, queries=3)
    assert algorithm.modes == [(False, False)]
    assert algorithm.training


@pytest.mark.parametrize(
    ("name", "options"), [("protonet", {}), ("matching_net", {}), ("protonet", {"metric": "cosine"})]
)
def test_embedding_each_sample_once_changes_nothing(name: str, options: dict[str, str]) -> None:
    data = points()
    calls = []
    model = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4))
    model.register_forward_pre_hook(lambda module, inputs: calls.append(len(inputs[0])))
    algorithm = innerloop.get(name)(model, **options)
    part = data.with_classes([1, 3, 4, 8, 9])
    once = evaluate(algorithm, part, ways=3, shots=2, episodes=60, queries=3)
    assert sum(calls) == 5 * 8
    drawn = [part.sample(20, 3, 2, 3, seed=0, first_task=first) for first in (0, 20, 40)]
    episode_by_episode = evaluate(algorithm, drawn)
    assert once.mean == pytest.approx(episode_by_episode.mean)
    assert once.ci95 == pytest.approx(episode_by_episode.ci95)


def test_embeddings_stay_with_their_class() -> None:
    data = points().with_classes([2, 5])
    algorithm = innerloop.get("protonet")(nn.Identity()).eval()
    embedded = embed(algorithm, data, batch=3)
    assert embedded.class_names == ["2", "5"]
    for position, index in enumerate(data.classes):
        np.testing.assert_array_equal(embedded.class_examples(position), data.class_examples(int(index)))


def test_inner_steps_in_place_of_its_own() -> None:
    data = innerloop.data.get("sinusoid").split("test")
    torch.manual_seed(0)
    algorithm = innerloop.get("maml")(nn.Sequential(nn.Linear(1, 20), nn.Tanh(), nn.Linear(20, 1)), inner_lr=0.01)
    records = [evaluate(algorithm, data, shots=100, episodes=20, inner_steps=steps) for steps in (0, 1, 8, None)]
    assert [record.inner_steps for record in records] == [0, 1, 8, 1]
    assert records[0].mean > records[1].mean > records[2].mean
    assert records[3] == records[1]
    assert algorithm.inner_steps == 1
    assert records[0].ways is None
    learner = innerloop.get("maml")(algorithm.model, inner_lr=0.01, inner_steps=8)
    assert evaluate(learner, data, shots=100, episodes=20).mean == records[2].mean


@pytest.mark.parametrize("bn", ["transductive", "support"])
def test_the_batch_norm_mode_is_recorded(bn: str) -> None:
    data = innerloop.data.get("glyphs", rotations=False).split("test")
    algorithm = innerloop.get("maml")(conv4(filters=4, downsample="stride"), bn=bn)
    assert evaluate(algorithm, data, episodes=2).bn == bn


@pytest.mark.parametrize(
    ("algorithm", "mode"),
    [
        (innerloop.get("protonet")(nn.Linear(6, 2)), "none"),
        (innerloop.get("protonet")(nn.BatchNorm1d(6)), "running"),
        (innerloop.get("maml")(nn.BatchNorm1d(6), bn="running"), "running"),
    ],
)
def test_batch_norm_mode(algorithm: Algorithm, mode: str) -> None:
    assert batch_norm_mode(algorithm) == mode


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"episodes": 1}, "episodes is 1, expected at least 2"),
        ({"inner_steps": 3}, "inner_steps is 3, but Recorder has no inner loop"),
        ({"ways": 99}, "ways"),
        ({"shots": 9}, "shots"),
    ],
)
def test_what_cannot_be_evaluated(options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        evaluate(Recorder(first_class), points(), **{"queries": 2, **options})


def test_a_record_as_text() -> None:
    record = Evaluation("accuracy", 0.9314, 0.0052, 600, 5, 1, 15, 0, 3, "transductive")
    assert str(record) == (
        "accuracy 93.14 ± 0.52 % (5-way 1-shot, 600 episodes, inner steps 3, BatchNorm transductive)"
    )
    record = Evaluation("mse", 0.4683, 0.0431, 600, None, 10, 15, 0, None, "none")
    assert str(record) == "mean squared error 0.4683 ± 0.0431 (600 episodes, BatchNorm none)"
