"""Algorithms by the same tests; what is one paper's own is in test_heads.py and test_maml_pp.py."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

import innerloop
from algorithm_cases import CASES, Case, assert_resumes_bit_for_bit, build, data, ragged
from command_line import CommandLine
from innerloop import EmbeddingAlgorithm, TaskBatch
from innerloop.training import TrainingSettings, fit

every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
without_head = pytest.mark.parametrize("case", [case for case in CASES if case.ways is None], ids=lambda case: case.id)
embedding_methods = pytest.mark.parametrize(
    "case", [case for case in CASES if case.name not in ("finetune", "maml_pp")], ids=lambda case: case.id
)


@every_case
def test_it_learns_to_tell_classes_apart_that_it_has_not_seen(case: Case) -> None:
    algorithm = build(case)
    before = innerloop.evaluate(algorithm, data().split("test"), ways=3, shots=2, episodes=100, queries=3).mean
    parameters = [parameter.detach().clone() for parameter in algorithm.parameters()]
    fit(algorithm, data().split("train"), settings=TrainingSettings(**case.training))
    after = innerloop.evaluate(algorithm, data().split("test"), ways=3, shots=2, episodes=100, queries=3).mean
    if case.learns:
        assert after > before + 0.03
        assert after > 0.6  # a guess is right in a third
    else:  # the floor
        assert all(map(torch.equal, parameters, algorithm.parameters()))


@without_head
@pytest.mark.parametrize(("ways", "shots"), [(2, 1), (7, 3)])
def test_other_ways_and_shots_than_in_training(case: Case, ways: int, shots: int) -> None:
    algorithm = build(case).eval()
    tasks = data().split("test").sample(3, ways, shots, queries=2, seed=0)
    result = algorithm(tasks)
    assert result.logits.shape == (3, 2 * ways, ways)
    assert result.task_losses.shape == result.task_accuracies.shape == (3,)
    assert result.logits.isfinite().all()


@every_case
def test_a_padded_task_is_the_task(case: Case) -> None:
    algorithm = build(case).eval()
    batch = ragged()
    together = algorithm(batch)
    for index, task in enumerate(batch):
        s, q = task.support_mask[0], task.query_mask[0]
        alone = algorithm(TaskBatch(task.support_x[:, s], task.support_y[:, s], task.query_x[:, q], task.query_y[:, q]))
        torch.testing.assert_close(together.logits[index][q], alone.logits[0])
        torch.testing.assert_close(together.task_losses[index], alone.task_losses[0])


@every_case
def test_what_padding_holds_does_not_matter_in_training(case: Case) -> None:
    """Not to the loss, not to a gradient, not to a BatchNorm statistic."""
    batch = ragged()
    classes = torch.tensor([[3, 9, 4], [0, 20, 7]])
    outcomes = []
    for rubbish in (0.0, 1e4):
        algorithm = build(case).train()
        x = [torch.where(mask[..., None, None, None], x, rubbish) for x, mask in _sides(batch)]
        tasks = TaskBatch(
            x[0], batch.support_y, x[1], batch.query_y, batch.support_mask, batch.query_mask, classes=classes
        )
        result = algorithm(tasks)
        result.loss.backward()
        gradients = [p.grad for p in algorithm.parameters() if p.grad is not None]
        assert gradients
        outcomes.append([result.task_losses, *gradients, *algorithm.buffers()])
    for one, other in zip(*outcomes, strict=True):
        torch.testing.assert_close(one, other)


def _sides(batch: TaskBatch) -> list[tuple[Tensor, Tensor]]:
    return [(batch.support_x, batch.support_mask), (batch.query_x, batch.query_mask)]


@every_case
def test_the_adapted_learner_says_what_evaluation_says(case: Case) -> None:
    algorithm = build(case).eval()
    tasks = data().split("test").sample(1, 3, 2, 4, seed=2)
    expected = algorithm(tasks).logits[0]
    learner = algorithm.adapt(tasks.support_x[0], tasks.support_y[0])
    for parameter in algorithm.parameters():
        parameter.data.zero_()
    torch.testing.assert_close(learner(tasks.query_x[0]).detach(), expected)


@embedding_methods
def test_evaluation_embeds_each_sample_once_and_changes_nothing(case: Case) -> None:
    algorithm = build(case)
    assert isinstance(algorithm, EmbeddingAlgorithm)
    embedded = []
    algorithm.model.register_forward_pre_hook(lambda module, inputs: embedded.append(len(inputs[0])))
    part = data().split("test")
    once = innerloop.evaluate(algorithm, part, ways=4, shots=2, episodes=40, queries=3)
    assert sum(embedded) == 12 * 18
    drawn = [part.sample(20, 4, 2, 3, seed=0, first_task=first) for first in (0, 20)]
    episode_by_episode = innerloop.evaluate(algorithm, drawn)
    assert once.mean == pytest.approx(episode_by_episode.mean)
    assert once.ci95 == pytest.approx(episode_by_episode.ci95)


@every_case
def test_resumed_bit_for_bit(case: Case, tmp_path: Path) -> None:
    assert_resumes_bit_for_bit(lambda: build(case, dropout=0.3), case.training, tmp_path)


@pytest.mark.parametrize(("name", "ways"), sorted({(case.name, 5 if case.ways else 7) for case in CASES}))
def test_trained_and_evaluated_from_the_command_line(
    innerloop_cli: CommandLine, tmp_path: Path, name: str, ways: int
) -> None:
    small = ("--model-option", "filters=4", "--model-option", "downsample=stride", "--validation-episodes", 4)
    run = tmp_path / "run"
    innerloop_cli("train", name, "--data", "glyphs", "--run", run, "--steps", 2, "--episodes", 10, *small)
    record = json.loads(innerloop_cli("evaluate", run, "--ways", ways, "--shots", 2, "--episodes", 10, "--json"))
    assert (record["ways"], record["shots"], record["episodes"]) == (ways, 2, 10)
    assert 0 < record["mean"] < 1
