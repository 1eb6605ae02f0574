"""Any algorithm under Lightning's Trainer: the steps of innerloop.fit, on the same tasks."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.utils.data import DataLoader

import innerloop
from innerloop import Algorithm, Dataset, Result, TaskBatch
from innerloop.compat.lightning import MetaLearner, TaskStream
from innerloop.training import TrainingSettings

POSSIBLE = "lightning.fabric.utilities.warnings.PossibleUserWarning"
pytestmark = [
    # Advice about speed, of no use to a few small batches made in this process.
    pytest.mark.filterwarnings(f"ignore:.*does not have many workers:{POSSIBLE}"),
    # Of torch 2.13, about how Lightning 2.6 uses it.
    pytest.mark.filterwarnings(r"ignore:`isinstance\(treespec, LeafSpec\)` is deprecated:FutureWarning"),
]


class Scaled(Algorithm):
    """A third party's: the model's outputs as they are, and a scale of its own."""

    def __init__(self, model: nn.Module, scale: float = 1.0) -> None:
        super().__init__(model)
        self.scale = nn.Parameter(torch.tensor(scale))

    def forward(self, tasks: TaskBatch) -> Result:
        return Result.of(self.scale * torch.stack([self.model(x) for x in tasks.query_x]), tasks.query_y, None)

    def adapt(self, support_x: Tensor, support_y: Tensor) -> nn.Module:
        return self.model


@cache
def data(split: Any) -> Dataset:
    return innerloop.data.get("glyphs").split(split)


def glyphs(batches: int, split: Any = "train", dtype: torch.dtype = torch.float32) -> TaskStream:
    class InDtype(TaskStream):
        def __getitem__(self, batch: int) -> TaskBatch:
            return super().__getitem__(batch).to(dtype)

    return InDtype(data(split), batches, tasks=4, queries=3)


def batches_of(stream: TaskStream, **options: Any) -> DataLoader[TaskBatch]:
    return DataLoader(stream, batch_size=None, **options)


def net(outputs: int = 5) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, outputs))


class Curve(Callback):
    """The training loss of every step."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, *_: Any) -> None:
        self.losses.append(float(outputs["loss"]))


def trainer(*callbacks: Callback, **options: Any) -> lightning.Trainer:
    silent = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    settings = {"accelerator": "cpu", "max_epochs": 1, "log_every_n_steps": 1, **silent, **options}
    return lightning.Trainer(callbacks=list(callbacks), **settings)


ALGORITHMS: dict[str, tuple[Any, dict[str, Any], dict[str, Any]]] = {
    # what is passed as the algorithm, its options, of the Trainer
    "maml": ("maml", {"inner_lr": 0.3, "inner_steps": 2}, {}),
    "maml, torch engine": ("maml", {"inner_lr": 0.3, "engine": "torch"}, {}),
    "maml, clipped": ("maml", {"inner_lr": 0.3}, {"gradient_clip_val": 0.1}),
    "meta_sgd": ("meta_sgd", {}, {}),
    "maml_pp, which anneals over the whole training": ("maml_pp", {"inner_steps": 2}, {}),
    "protonet": ("protonet", {"metric": "cosine", "temperature": 0.1}, {}),
    "baseline": (
        "baseline",
        {"training_classes": data("train").num_classes, "input_shape": (1, 28, 28)},
        {},
    ),
    "a class": (Scaled, {"scale": 0.5}, {}),
}


@pytest.mark.parametrize(("name", "dtype"), [*((name, torch.float32) for name in ALGORITHMS), ("maml", torch.float64)])
def test_the_steps_are_those_of_fit(name: str, dtype: torch.dtype) -> None:
    algorithm, options, of_trainer = ALGORITHMS[name]
    optimizer = partial(torch.optim.SGD, lr=0.05, momentum=0.9)
    learner = MetaLearner(algorithm, net().to(dtype), options, optimizer).to(dtype)
    curve = Curve()
    validation = batches_of(glyphs(2, "val", dtype))  # before, and after: it leaves nothing behind
    trainer(curve, **of_trainer).fit(learner, batches_of(glyphs(6, dtype=dtype)), validation)

    twin = innerloop.get(algorithm)(net().to(dtype), **options).to(dtype)
    settings = TrainingSettings(steps=6, clip=of_trainer.get("gradient_clip_val", 0.0))
    history = innerloop.fit(
        twin, list(glyphs(6, dtype=dtype)), settings=settings, optimizer=optimizer(twin.parameters())
    )
    assert curve.losses == [record["loss"] for record in history.steps]
    for (parameter_name, parameter), other in zip(learner.algorithm.named_parameters(), twin.parameters(), strict=True):
        assert torch.equal(parameter, other), parameter_name


def sinusoids(batches: int) -> TaskStream:
    return TaskStream(innerloop.data.get("sinusoid"), batches, tasks=3, shots=5)


@pytest.mark.parametrize("inference_mode", [True, False])
@pytest.mark.parametrize("name", ["maml", "maml, torch engine", "protonet", "reptile"])
def test_validation_and_test_log_means_over_tasks_by_the_usual_names(name: str, inference_mode: bool) -> None:
    algorithm, options, _ = ALGORITHMS.get(name, (name, {"inner_lr": 0.3}, {}))
    learner = MetaLearner(algorithm, net(), options)
    expected = innerloop.evaluate(learner.algorithm, list(glyphs(3, "val"))).mean
    before = {key: value.clone() for key, value in learner.state_dict().items()}
    lightning_trainer = trainer(inference_mode=inference_mode)
    (validated,) = lightning_trainer.validate(learner, batches_of(glyphs(3, "val")), verbose=False)
    (tested,) = lightning_trainer.test(learner, batches_of(glyphs(3, "val")), verbose=False)
    assert sorted(validated) == ["val_accuracy", "val_loss"]
    assert sorted(tested) == ["test_accuracy", "test_loss"]
    assert validated["val_accuracy"] == tested["test_accuracy"] == pytest.approx(expected, rel=1e-6)
    assert validated["val_loss"] == tested["test_loss"]
    assert all(torch.equal(value, before[key]) for key, value in learner.state_dict().items())


def test_training_logs_loss_and_accuracy_and_regression_the_loss_alone() -> None:
    classifier = MetaLearner("protonet", net())
    run = trainer()
    run.fit(classifier, batches_of(glyphs(1)), batches_of(glyphs(1, "val")))
    assert set(run.logged_metrics) == {"train_loss", "train_accuracy", "val_loss", "val_accuracy"}
    regressor = MetaLearner("maml", nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 1)), {"inner_lr": 0.01})
    run = trainer()
    run.fit(regressor, batches_of(sinusoids(2)), batches_of(sinusoids(1)))
    assert set(run.logged_metrics) == {"train_loss", "val_loss"}
    with torch.no_grad():
        assert float(run.logged_metrics["val_loss"]) == pytest.approx(float(regressor(sinusoids(1)[0]).loss))


def test_a_checkpoint_restores_the_module_and_training_goes_on_from_it(tmp_path: Path) -> None:
    def learner() -> MetaLearner:
        return MetaLearner("meta_sgd", net(), {"inner_lr": 0.2}, partial(torch.optim.Adam, lr=0.01))

    loaders = batches_of(glyphs(4)), batches_of(glyphs(1, "val"))
    whole = learner()
    trainer(max_epochs=2).fit(whole, *loaders)
    half = learner()
    run = trainer()
    run.fit(half, *loaders)
    path = tmp_path / "half.ckpt"
    run.save_checkpoint(path)

    restored = MetaLearner.load_from_checkpoint(
        path, algorithm="meta_sgd", model=net(outputs=5), options={"inner_lr": 0.2}, weights_only=True
    )
    assert all(torch.equal(a, b) for a, b in zip(restored.parameters(), half.parameters(), strict=True))
    resumed = learner()
    trainer(max_epochs=2).fit(resumed, *loaders, ckpt_path=path, weights_only=True)
    for (name, parameter), other in zip(resumed.named_parameters(), whole.parameters(), strict=True):
        assert torch.equal(parameter, other), name


def test_an_optimizer_comes_with_its_schedule() -> None:
    def scheduled(parameters: Any) -> dict[str, Any]:
        optimizer = torch.optim.SGD(parameters, lr=0.5)
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.1)}

    learner = MetaLearner("protonet", net(), optimizer=scheduled)
    run = trainer(max_epochs=2, limit_val_batches=0)
    run.fit(learner, batches_of(glyphs(1)), batches_of(glyphs(1, "val")))
    (group,) = run.optimizers[0].param_groups
    assert group["lr"] == pytest.approx(0.005)
    assert len(group["params"]) == len(list(learner.algorithm.parameters()))


def test_tasks_go_to_the_trainers_device() -> None:
    batch = glyphs(1)[0]
    moved = MetaLearner("protonet", net()).transfer_batch_to_device(batch, torch.device("meta"), 0)
    assert isinstance(moved, TaskBatch)
    tensors = [moved.support_x, moved.support_y, moved.query_x, moved.query_y, moved.classes]
    assert all(tensor.device.type == "meta" for tensor in tensors)
    assert batch.support_x.device.type == "cpu"


# --- the task stream --------------------------------------------------------------------------------


def assert_same(batches: Sequence[TaskBatch], expected: Sequence[TaskBatch]) -> None:
    for batch, other in zip(batches, expected, strict=True):
        assert torch.equal(batch.support_x, other.support_x)
        assert torch.equal(batch.query_y, other.query_y)


def test_a_stream_has_the_tasks_that_fit_samples() -> None:
    stream = TaskStream(data("train"), 3, tasks=2, ways=4, shots=3, queries=1, seed=7)
    assert len(stream) == 3
    assert_same(list(batches_of(stream)), [data("train").sample(2, 4, 3, 1, 7, 2 * number) for number in range(3)])


def test_workers_and_processes_share_a_streams_batches() -> None:
    stream = sinusoids(4)
    assert_same(list(batches_of(stream, num_workers=1)), list(stream))
    halves = [
        list(batches_of(stream, sampler=torch.utils.data.DistributedSampler(stream, 2, rank, shuffle=False)))
        for rank in (0, 1)
    ]
    assert_same(halves[0], [stream[0], stream[2]])
    assert_same(halves[1], [stream[1], stream[3]])


# --- errors -------------------------------------------------------------------------------------------


def test_bad_arguments() -> None:
    with pytest.raises(innerloop.UnknownNameError, match="Did you mean 'maml'"):
        MetaLearner("mamml", net())
    with pytest.raises(ValueError, match="engine is 'nativ'"):
        MetaLearner("maml", net(), {"engine": "nativ"})
    for name in ("batches", "tasks"):
        with pytest.raises(ValueError, match=f"{name} is 0, expected at least 1"):
            TaskStream(innerloop.data.get("sinusoid"), **{"batches": 1, name: 0})


def test_a_precision_that_cannot_convert_tasks_says_what_to_do() -> None:
    with pytest.raises(ValueError, match=r"precision is '64-true'.*model\.double\(\)"):
        trainer(precision="64-true").fit(MetaLearner("protonet", net()), batches_of(glyphs(1)), batches_of(glyphs(1)))


@pytest.mark.parametrize("stage", ["fit", "validate"])
def test_a_loader_of_something_else_says_what_was_expected(stage: str) -> None:
    pairs = DataLoader([(torch.zeros(1), torch.zeros(1))])
    run = partial(trainer().fit, val_dataloaders=pairs) if stage == "fit" else trainer().validate
    with pytest.raises(TypeError, match="the loader gave a list, expected a TaskBatch"):
        run(MetaLearner("protonet", net()), pairs)


def test_without_lightning_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "innerloop.compat.lightning")
    monkeypatch.setitem(sys.modules, "lightning.pytorch", None)  # Python's way to say: not installed
    with pytest.raises(ImportError, match=r"pip install 'innerloop\[lightning\]'"):
        importlib.import_module("innerloop.compat.lightning")
