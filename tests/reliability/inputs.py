"""Bad arguments for every op, public and native, and for the decoder of Programs: each call must return, or be refused
by a Python exception that names an argument.

    python -m reliability.inputs --cases N [--seed S] [--first I]

A case takes a sound call and changes some of its arguments: shapes, strides, dtypes, devices, layouts, sizes beyond any
memory, values that are no numbers, labels out of range, integers of the encoded Program, things that are no tensors.
Case i of a seed is the same whatever ran before it. The last line of output is JSON.

Native code runs in the process: what it must not do ends the process, above all under the sanitizers
(tests/sanitized_python.sh), and the file of --progress then holds the number of the case.
"""

from __future__ import annotations

import argparse
import faulthandler
import inspect
import json
import logging
import os
import re
import resource
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import innerloop
from innerloop import TaskBatch, ops, primitives

HUGE = (2**31, 2**33, 2**40, 2**62)
INTEGERS = (-(2**63), -(2**31), -2, -1, 0, 1, 2, 3, 7, 2**31, 2**32 + 1, 2**62, 2**63 - 1)
FLOATS = (float("nan"), float("inf"), -float("inf"), 0.0, -1.0, 1e-310, 1e300)
DTYPES = (
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64),
    *(torch.int32, torch.int64, torch.uint8, torch.bool),
)
ODD_THINGS = (None, 3, 2.5, "x", [], [1, 2], {}, np.zeros(2), object())

#: A refusal is one of these.
REFUSALS = (TypeError, ValueError, RuntimeError, IndexError, OverflowError, MemoryError)
#: What torch says before the op is asked, or while the op asks for memory: of a tensor too large for memory, of a
#: device, layout or dtype that has no kernel.
BY_TORCH = re.compile(
    r"alloc|memory|overflow|too large|exceed|Could not run|not implemented for|[Ss]parse|"
    r"aten::(contiguous|new_empty|empty|new_zeros)|"
    r"Not yet supported ScalarType|cannot be represented as a SymInt|no tensor arguments"
)
#: A value that does not fit is named with its task.
OF_A_TASK = re.compile(r"\btask \d+")

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


# --- sound calls ----------------------------------------------------------------------------------


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
    by_name: dict[str, list[Call]] = {}
    for call in recorder.calls:
        by_name.setdefault(call.name, []).append(call)
    # maml_plan takes what maml takes, but for the gradients that are wanted.
    plan = torch.ops.innerloop.maml_plan.default
    names = [argument.name for argument in plan._schema.arguments]
    by_name["innerloop::maml_plan"] = [
        Call("innerloop::maml_plan", plan, {name: call.arguments[name] for name in names})
        for call in by_name["innerloop::maml"]
    ]
    return [call for calls in by_name.values() for call in calls]


# --- changes --------------------------------------------------------------------------------------


class Changer:
    """Changes arguments at random."""

    def __init__(self, random: np.random.Generator) -> None:
        self.random = random

    def one_of(self, choices: Any) -> Any:
        return choices[int(self.random.integers(len(choices)))]

    def changed(self, arguments: Arguments) -> dict[str, Any]:
        result = dict(arguments)
        if self.random.random() < 0.2:
            return self._same_size_everywhere(result)
        for _ in range(1 + int(self.random.geometric(0.6))):
            name = self.one_of(list(result))
            if name == "program" and self.random.random() < 0.5:
                continue
            result[name] = self._argument(name, result[name])
        if "program" in result and self.random.random() < 0.7:
            for _ in range(int(self.random.geometric(0.5))):
                result["program"] = self._program(list(result["program"]))
        return result

    def _argument(self, name: str, value: Any) -> Any:
        if self.random.random() < 0.03:
            return self.one_of(ODD_THINGS)
        if isinstance(value, Tensor):
            return self._tensor(value)
        if isinstance(value, bool):
            return not value
        if isinstance(value, int):
            return self.one_of(INTEGERS)
        if isinstance(value, float):
            return self.one_of(FLOATS)
        if isinstance(value, str):
            return self.one_of(["mse", "cosine", "dot", "euclidean", "support", "running", "torch", "", "no such"])
        if isinstance(value, (list, tuple)):
            return self._list(name, list(value))
        return self.one_of([torch.ones(2, 6, dtype=torch.bool), torch.zeros(()), "1", None])

    def _list(self, name: str, values: list[Any]) -> list[Any]:
        kind = self.one_of(["member", "member", "member", "drop", "repeat", "empty", "reverse"])
        if not values or kind == "empty":
            return []
        place = int(self.random.integers(len(values)))
        if kind == "member":
            values[place] = self._argument(name, values[place])
        elif kind == "drop":
            del values[place]
        elif kind == "repeat":
            values.insert(place, values[place])
        else:
            values.reverse()
        return values

    def _program(self, code: list[int]) -> list[int]:
        kind = self.one_of(["value"] * 5 + ["near"] * 5 + ["drop", "repeat", "cut", "swap"])
        if not code or not all(isinstance(number, int) for number in code):
            return [self.one_of(INTEGERS)]
        place = int(self.random.integers(len(code)))
        if kind == "value":
            code[place] = self.one_of(INTEGERS)
        elif kind == "near":
            code[place] += int(self.random.integers(-3, 4))
        elif kind == "drop":
            del code[place]
        elif kind == "repeat":
            code[place:place] = code[place : place + int(self.random.integers(1, 9))]
        elif kind == "cut":
            del code[place:]
        else:
            other = int(self.random.integers(len(code)))
            code[place], code[other] = code[other], code[place]
        return [min(max(value, -(2**63)), 2**63 - 1) for value in code]

    def _tensor(self, tensor: Tensor) -> Any:
        if tensor.numel() > 100_000:  # huge already
            return tensor
        kind = self.one_of(["dtype", "dims", "size", "size", "huge", "strides", "strides", "values", "values", "place"])
        dim = int(self.random.integers(tensor.dim())) if tensor.dim() else 0
        if kind == "dtype":
            return tensor.to(self.one_of(DTYPES))
        if kind == "values" and tensor.numel():
            return self._with_values(tensor)
        if kind == "place":
            return self.one_of(
                [
                    lambda: tensor.to("meta"),
                    lambda: tensor.to_sparse(),
                    lambda: torch._neg_view(tensor),
                    lambda: tensor.clone().requires_grad_(tensor.is_floating_point()),
                    lambda: tensor.numpy(force=True),
                    lambda: nn.Parameter(tensor.detach(), requires_grad=False),
                ]
            )()
        if kind == "dims" or tensor.dim() == 0:
            return self.one_of([tensor[None], tensor[..., None], tensor.flatten(), tensor.sum(0)])
        if kind == "size":
            return resized(tensor, dim, self.one_of([0, 1, tensor.shape[dim] + 1, 2 * tensor.shape[dim], 17]))
        if kind == "huge":
            return resized(tensor, dim, self.one_of(HUGE))
        return self.one_of(
            [
                lambda: tensor.transpose(0, dim).contiguous().transpose(0, dim),
                lambda: tensor.repeat_interleave(2, dim).narrow(dim, 0, 2 * tensor.shape[dim])[
                    (slice(None),) * dim + (slice(None, None, 2),)
                ],
                lambda: tensor.flip(dim),
                lambda: tensor.transpose(0, dim),
                lambda: resized(tensor, dim, 1).expand(tensor.shape) if tensor.shape[dim] else tensor,
                lambda: torch.cat([tensor.flatten()[:1], tensor.flatten()])[1:].view(tensor.shape),
            ]
        )()

    def _with_values(self, tensor: Tensor) -> Tensor:
        tensor = tensor.clone()
        flat = tensor.view(-1)
        places = slice(None) if self.random.random() < 0.3 else int(self.random.integers(len(flat)))
        if tensor.is_floating_point():
            flat[places] = self.one_of(FLOATS)
        elif tensor.dtype == torch.bool:
            flat[places] = ~flat[places]
        elif tensor.dtype == torch.int64:
            flat[places] = self.one_of(INTEGERS)
        return tensor

    def _same_size_everywhere(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """A size that some tensors have in common becomes another in all of them."""
        members = [value if isinstance(value, (list, tuple)) else [value] for value in arguments.values()]
        tensors = [t for group in members for t in group if isinstance(t, Tensor) and t.dim()]
        if not tensors:
            return arguments
        size = self.one_of(self.one_of(tensors).shape)
        # A look at each of so many labels would take hours: only what holds none becomes huge.
        counted = any(size in t.shape for t in tensors if not t.is_floating_point())
        new = self.one_of([0, 1, size + 1, 17] if counted else [0, 1, size + 1, 17, *HUGE])

        def resize(value: Any) -> Any:
            if isinstance(value, (list, tuple)):
                return [resize(member) for member in value]
            if isinstance(value, Tensor):
                for dim in range(value.dim()):
                    if value.shape[dim] == size:
                        value = resized(value, dim, new)
            return value

        return {name: resize(value) for name, value in arguments.items()}


def resized(tensor: Tensor, dim: int, size: int) -> Tensor:
    """With as many entries along a dimension; repeated, and where there are too many for memory, the first one's."""
    if tensor.shape[dim] == 0:
        return tensor.new_zeros([*tensor.shape[:dim], min(size, 17), *tensor.shape[dim + 1 :]])
    if size > 1000:
        return tensor.narrow(dim, 0, 1).expand([*tensor.shape[:dim], size, *tensor.shape[dim + 1 :]])
    return tensor.index_select(dim, torch.arange(size) % tensor.shape[dim])


# --- the run --------------------------------------------------------------------------------------


def run(cases: int, seed: int, first: int = 0, progress: int | None = None) -> dict[str, Any]:
    """Counts of calls that returned and were refused by op, and what was wrong with refusals."""
    public = list(public_calls())
    # The shorter list is of the functions that a user calls.
    calls = [public, native_calls(public)]
    returned, refused = Counter[str](), Counter[str]()
    wrong: dict[str, int] = {}
    for case in range(first, cases):
        if progress is not None:
            os.pwrite(progress, f"{case:12}".encode(), 0)
        if case % 100 == 0:
            faulthandler.dump_traceback_later(60, exit=True)  # a call without end
        changer = Changer(np.random.default_rng([seed, case]))
        call = changer.one_of(calls[case % 2])
        try:
            arguments = changer.changed(call.arguments)
        # No such argument can be: a size beyond 64 bits, a sparse tensor as an array, an entry of no list, …
        except (RuntimeError, TypeError):
            arguments = dict(call.arguments)
        problem = outcome(call, arguments)
        (returned if problem is None else refused)[call.name] += 1
        if problem:
            key = f"{call.name}: {problem}"
            wrong.setdefault(re.sub(r"-?\d+", "N", key), case)
    faulthandler.cancel_dump_traceback_later()
    return {
        "cases": cases - first,
        "returned": returned.total(),
        "refused": refused.total(),
        "ops": len(returned | refused),
        "failures": [f"case {case} of seed {seed}: {what}" for what, case in wrong.items()],
    }


def outcome(call: Call, arguments: Arguments) -> str | None:
    """None: the call returned; "": it was refused as it should be; else what is wrong with the refusal."""
    try:
        with torch.set_grad_enabled(call.name.startswith("maml_loss")):
            call.function(**arguments)
    except REFUSALS as error:
        message = str(error)
        named = call.names().search(message) or OF_A_TASK.search(message)
        if named or isinstance(error, MemoryError) or BY_TORCH.search(message) or on_meta(arguments):
            return ""
        return f"{type(error).__name__} names no argument: {message[:300]}"
    except Exception as error:
        return f"raised {type(error).__name__}: {str(error)[:300]}"
    return None


def on_meta(value: Any) -> bool:
    """Whether there is a tensor without memory, for which an op's fake stands, which checks nothing."""
    if isinstance(value, Mapping):
        return any(map(on_meta, value.values()))
    if isinstance(value, (list, tuple)):
        return any(map(on_meta, value))
    return isinstance(value, Tensor) and value.is_meta


def main() -> None:
    parser = argparse.ArgumentParser(description="Bad arguments for every op.")
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument(
        "--progress", type=int, help="file descriptor that the number of the running case is written to"
    )
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    if "libasan" not in os.environ.get("LD_PRELOAD", ""):  # AddressSanitizer has a limit of its own
        resource.setrlimit(resource.RLIMIT_AS, (6 << 30, 6 << 30))
    print(json.dumps(run(given.cases, given.seed, given.first, given.progress)))


if __name__ == "__main__":
    main()
