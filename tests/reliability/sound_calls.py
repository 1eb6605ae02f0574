"""Sound calls of every op, public and native: what reliability.inputs changes."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import innerloop
from innerloop import TaskBatch, ops, primitives

Arguments = Mapping[str, Any]


@dataclass(frozen=True)
class Call:
    """A sound call, by argument name."""

    name: str
    function: Callable[..., Any]
    arguments: Arguments

    def names(self) -> re.Pattern[str]:
        """Of arguments, in a message."""
        return re.compile(r"\b(" + "|".join(map(re.escape, [*self.arguments, "program", "tasks"])) + r")(s?\b|_)")


def by_op() -> dict[str, list[Call]]:
    """All of them."""
    public = list(public_calls())
    calls: dict[str, list[Call]] = {}
    for call in [*public, *native_calls(public)]:
        calls.setdefault(call.name, []).append(call)
    return calls


def public_calls() -> Iterator[Call]:
    """Of the functions in innerloop.ops, and of maml_loss. Sizes differ, so that a changed one meets no other."""
    for dtype in (torch.float64, torch.float32):
        g = torch.Generator().manual_seed(0)

        def random(*shape: int, dtype: torch.dtype = dtype, g: torch.Generator = g) -> Tensor:
            return torch.randn(shape, generator=g, dtype=torch.float64).to(dtype)

        labels = torch.tensor([[0, 1, 2, 0, 1, 2], [2, 1, 0, 0, 1, 2]])
        mask = torch.tensor([[True] * 6, [True] * 5 + [False]])
        support, queries = random(2, 6, 7), random(2, 5, 7)
        heads = {"support": support, "labels": labels, "queries": queries, "num_classes": 3}
        tables: dict[str, Arguments] = {
            "prototypes": {"embeddings": support, "labels": labels, "num_classes": 3, "mask": mask},
            "pairwise_distance": {
                **{"queries": queries, "prototypes": random(2, 3, 7)},
                **{"metric": "sqeuclidean", "temperature": 1.0},
            },
            "prototype_logits": {**heads, "metric": "cosine", "temperature": 1.0, "mask": mask},
            "prototype_loss": {
                **{**heads, "query_labels": labels[:, :5], "temperature": 1.0},
                **{"mask": mask, "query_mask": mask[:, :5]},
            },
            "attention_classify": {**heads, "temperature": 1.0, "mask": mask},
            "ridge_head": {**heads, "regularization": 0.5, "mask": mask},
            "svm_head": {
                **{**heads, "C": 0.1, "max_iterations": 50, "tolerance": 1e-8},
                **{"diagonal": 0.5, "mask": mask},
            },
            "inner_update": {
                **{"params": [random(2, 3), random(2, 4, 5)], "grads": [random(2, 3), random(2, 4, 5)]},
                "lr": [0.1, random(2, 4, 5)],
            },
            "coordinate_lstm": {
                **{"gradients": random(3, 12), "state": random(4, 5, 12)},
                **{"first": random(20, 8), "second": random(20, 11), "output": random(6)},
                **{"p": 10.0, "averaged": 0, "tasks": 2},
            },
        }
        tables["svm_solve"] = {name: value for name, value in tables["svm_head"].items() if name != "queries"}
        for name, arguments in tables.items():
            yield Call(name, getattr(ops, name), arguments)
        for name, (model, shape) in networks().items():
            yield Call(f"maml_loss of {name}", _loss_of(model.to(dtype)), _tasks(random, shape))


def networks() -> dict[str, tuple[nn.Module, tuple[int, ...]]]:
    """Every kind of node of a Program, and the shape of a sample."""
    torch.manual_seed(0)
    return {
        "mlp": (nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.LayerNorm(8), nn.GELU(), nn.Linear(8, 3)), (6,)),
        "blocks": (
            nn.Sequential(
                *(nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2)),
                *(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(36, 3)),
            ),
            (2, 7, 6),
        ),
        "others": (
            nn.Sequential(
                *(nn.Conv2d(2, 4, 3, stride=2, bias=False), nn.GroupNorm(2, 4), nn.LeakyReLU(0.1)),
                *(Residual(4), nn.AvgPool2d(2, 1, 1), nn.Sigmoid(), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
                nn.Linear(4, 3),
            ),
            (2, 7, 6),
        ),
    }


class Residual(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.inside = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inside(x)


def _tasks(random: Callable[..., Tensor], shape: tuple[int, ...]) -> Arguments:
    return {
        **{"support_x": random(2, 6, *shape), "support_y": torch.tensor([[0, 1, 2, 0, 1, 2], [2, 1, 0, 0, 1, 2]])},
        **{"query_x": random(2, 5, *shape), "query_y": torch.tensor([[0, 1, 2, 0, 1], [2, 1, 0, 0, 1]])},
        **{"support_mask": torch.tensor([[True] * 6, [True] * 5 + [False]]), "query_mask": None},
        **{"inner_lr": 0.1, "inner_steps": 2, "step_weights": [0.0, 0.5, 1.0], "support_weight": 0.5, "adapt": None},
        **{"first_order": False, "bn": "transductive", "loss": "cross_entropy", "engine": "native"},
    }


def _loss_of(model: nn.Module) -> Callable[..., Tensor]:
    """maml_loss with the parts of a TaskBatch as arguments, and its backward pass."""
    parts = [parameter for parameter in inspect.signature(TaskBatch).parameters if parameter != "classes"]

    def loss_of(**arguments: Any) -> Tensor:
        tasks = TaskBatch(**{name: arguments.pop(name) for name in parts})
        loss = innerloop.maml_loss(model, tasks, **arguments)
        if loss.requires_grad:
            loss.backward()
        return loss

    return loss_of


class _Recorder(TorchDispatchMode):
    """Notes the calls of innerloop's native ops."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace == "innerloop":
            names = [argument.name for argument in function._schema.arguments]
            arguments = dict(zip(names, args, strict=False)) | (kwargs or {})
            self.calls.append(Call(function._schema.name, function, arguments))
        return function(*args, **(kwargs or {}))


def native_calls(public: list[Call]) -> list[Call]:
    """The ops that the public functions, their derivatives and the derivatives of these call."""
    recorder = _Recorder()
    with recorder:
        for call in public:
            differentiable = [
                value.clone().requires_grad_() if isinstance(value, Tensor) and value.is_floating_point() else value
                for value in call.arguments.values()
            ]
            if call.name.startswith("maml_loss"):
                call.function(**call.arguments)
                continue
            output = call.function(**dict(zip(call.arguments, differentiable, strict=True)))
            leaves = [value for value in differentiable if isinstance(value, Tensor) and value.requires_grad]
            if leaves:
                outputs = output if isinstance(output, (tuple, list)) else [output]
                twice = not call.name.startswith(("svm", "coordinate"))
                total = sum(value.square().sum() for value in outputs if value.requires_grad)
                found = torch.autograd.grad(total, leaves, create_graph=twice, allow_unused=True)
                if twice:
                    total = sum(gradient.square().sum() for gradient in found if gradient is not None)
                    torch.autograd.grad(total, leaves, allow_unused=True)
        for model, shape in networks().values():
            random = torch.Generator().manual_seed(1)
            x = torch.randn(2, 6, *shape, generator=random)
            tasks = TaskBatch(
                x, torch.arange(6).remainder(3).repeat(2, 1), x, torch.arange(6).remainder(3).repeat(2, 1)
            )
            primitives.adapt(model, tasks, inner_lr=0.1, inner_steps=2, engine="native")
            vectors = {name: torch.ones(2, *value.shape) for name, value in model.named_parameters()}
            primitives.hessian_vector_product(model, tasks, vectors, engine="native")
    calls = recorder.calls
    # svm_weights calls svm_solve out of the recorder's sight, and maml_plan takes what maml takes but for the last two.
    weights = [call.arguments for call in calls if call.name == "innerloop::svm_weights"]
    grams = [{"gram": given["support"] @ given["support"].mT, **given} for given in weights]
    return [
        *calls,
        *_calls_of(torch.ops.innerloop.svm_solve.default, grams),
        *_calls_of(
            torch.ops.innerloop.maml_plan.default, [call.arguments for call in calls if call.name == "innerloop::maml"]
        ),
    ]


def _calls_of(op: Any, given: list[Arguments]) -> list[Call]:
    """Of an op with those of the given arguments that it has."""
    names = [argument.name for argument in op._schema.arguments]
    return [Call(op._schema.name, op, {name: arguments[name] for name in names}) for arguments in given]
