"""What users' files and arguments must not be able to do, and the short forms of tests/reliability's checks."""

from __future__ import annotations

import ast
import os
import re
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import innerloop
from innerloop import TaskBatch, ops
from innerloop.checkpoint import CheckpointError, load_checkpoint
from reliability import checkpoints, inputs, repeats, sound_calls, suite

PACKAGE = Path(innerloop.__file__).parent


# --- nothing that is read runs code ---------------------------------------------------------------

#: What reads code or turns bytes into it, by the last part of its name.
FORBIDDEN_MODULES = {"pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "runpy"}
FORBIDDEN_CALLS = {"eval", "exec", "extractall", "extract", "unpack_archive", "torch.load", "np.fromregex"}


def dangerous(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] in FORBIDDEN_MODULES)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in FORBIDDEN_MODULES:
            yield str(node.module)
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            if name in FORBIDDEN_CALLS or name.split(".")[-1] in ("extractall", "unpack_archive"):
                yield name
            safe = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            if name in ("np.load", "numpy.load") and safe.get("allow_pickle") != "False":
                yield f"{name} without allow_pickle=False"


def test_the_package_reads_no_pickle_and_unpacks_no_archive() -> None:
    # What innerloop bench pickles goes to processes of its own, by a pipe.
    sources = [path for path in sorted(PACKAGE.rglob("*.py")) if path.parent.name != "bench"]
    assert len(sources) > 50
    assert [f"{path.name}: {name}" for path in sources for name in dangerous(ast.parse(path.read_text()))] == []


@pytest.mark.parametrize("code", ["import pickle", "torch.load(f)", "np.load(f)", "z.extractall()", "eval(text)"])
def test_the_search_finds(code: str) -> None:
    assert list(dangerous(ast.parse(code)))


class Trap:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def test_a_pickle_in_place_of_a_checkpoint_is_not_run(tmp_path: Path) -> None:
    torch.save(Trap(tmp_path / "run"), tmp_path / "latest.safetensors")
    with pytest.raises(CheckpointError, match=r"latest\.safetensors cannot be read"):
        load_checkpoint(tmp_path / "latest.safetensors", nn.Linear(1, 1))
    assert not (tmp_path / "run").exists()


def pictures(root: Path, names: list[str]) -> None:
    image = pytest.importorskip("PIL.Image")
    picture = image.fromarray(np.zeros((4, 4), dtype=np.uint8))
    for part in ("images_background", "images_evaluation"):
        with zipfile.ZipFile(root / f"{part}.zip", "w") as archive:
            for name in names:
                with archive.open(f"{part}/{name}.png", "w") as file:
                    picture.save(file, "png")


def test_a_pickle_in_place_of_a_data_cache_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "cache"
    monkeypatch.setenv("INNERLOOP_CACHE", str(cache))
    pictures(tmp_path, ["Greek/character01/a"])
    innerloop.data.get("omniglot", root=tmp_path)
    (path,) = cache.iterdir()
    np.save(path, np.array([Trap(tmp_path / "run")], dtype=object), allow_pickle=True)
    innerloop.data.get("omniglot", root=tmp_path)
    assert not (tmp_path / "run").exists()


def test_names_in_an_archive_lead_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = tmp_path / "a" / "b" / "data"
    data.mkdir(parents=True)
    monkeypatch.setenv("INNERLOOP_CACHE", str(tmp_path / "cache"))
    pictures(data, ["../character01/a", "Greek/character../../../a", "Greek/character01/a"])
    before = {path for path in tmp_path.rglob("*") if (tmp_path / "cache") not in (path, *path.parents)}
    assert "../character01" in innerloop.data.get("omniglot", root=data).class_names
    after = {path for path in tmp_path.rglob("*") if (tmp_path / "cache") not in (path, *path.parents)}
    assert after == before


# --- arguments ------------------------------------------------------------------------------------


def test_bad_arguments_are_refused_by_name() -> None:
    found = inputs.run([sys.executable, "-m", "reliability.inputs"], 500)
    assert found.failures == []
    assert found.by_op.total() >= 500
    assert found.refused.total() > 250
    assert found.returned.total() > 50
    assert set(found.by_op) == set(sound_calls.by_op())


def test_every_op_is_tried() -> None:
    registered = {schema.name for schema in torch._C._jit_get_all_schemas() if schema.name.startswith("innerloop::")}
    # One has no arguments; the other is Python, which calls no kernel of ours.
    assert registered - set(sound_calls.by_op()) == {"innerloop::instruction_set", "innerloop::maml_backward"}
    assert {name for name in ops.__all__ if name.islower()} <= set(sound_calls.by_op())


PLANTED = """
import os, torch
from reliability import inputs
from reliability.sound_calls import Call

def planted(points, labels):
    if not isinstance(points, torch.Tensor) or not isinstance(labels, torch.Tensor):
        raise TypeError("points and labels must be tensors")
    if labels.dim() == 2 and labels.shape[1] > 6:
        FAULT

arguments = {"points": torch.zeros(2, 5, 7), "labels": torch.zeros(2, 6, dtype=torch.int64)}
inputs.main({"planted": [Call("planted", planted, arguments)]})
"""


def with_fault(tmp_path: Path, fault: str) -> inputs.Found:
    script = tmp_path / "planted.py"
    script.write_text(PLANTED.replace("FAULT", fault))
    return inputs.run([sys.executable, str(script)], 100)


def test_a_planted_fault_is_found_once_and_made_small(tmp_path: Path) -> None:
    (failure,) = with_fault(tmp_path, "raise ValueError('shapes differ')").failures
    call, change = failure.removesuffix(": ValueError names no argument: shapes differ").split(": ")
    assert call == "planted (sound call 0)"
    assert change in ("labels resized(1, 7)", "every tensor size_becomes(6, 7)")


def test_a_planted_crash_is_reported_and_the_next_batch_tried(tmp_path: Path) -> None:
    flag = str(tmp_path / "crashed")
    found = with_fault(tmp_path, f"os.path.exists({flag!r}) or (open({flag!r}, 'w'), os.abort())")
    (failure,) = found.failures
    assert re.match(r"batch 0: planted \(sound call 0\): .*(resized|size_becomes)", failure)
    assert "the process ended with -6" in failure
    assert found.by_op.total() >= 100


@pytest.mark.parametrize("calls", sound_calls.by_op().values(), ids=lambda calls: calls[0].name)
def test_none_in_place_of_an_argument_is_refused_by_name(calls: list[sound_calls.Call]) -> None:
    call = calls[0]
    for name in call.arguments:
        assert not inputs.outcome(call, {**call.arguments, name: None}), name


def test_so_many_tasks_without_elements_are_refused() -> None:
    none = torch.zeros(1, 0, 7).expand(2**40, 0, 7)  # a loop over its tasks would not end
    with pytest.raises(RuntimeError, match="a has size 1099511627776 in dimension 0, expected at most 2147483647"):
        torch.ops.innerloop.inner_products(none, none, False)
    with pytest.raises(ValueError, match=r"queries has shape \(1099511627776, 0, 7\), expected sizes of at most"):
        ops.pairwise_distance(none, none)


def test_large_systems_of_no_task() -> None:
    size = 2**31 - 1
    matrix = torch.empty(0, size, size, dtype=torch.float64)
    assert torch.ops.innerloop.solve_positive_definite(matrix, matrix[..., :2]).shape == (0, size, 2)


LABELS = torch.tensor([[0, 1, 2]])
X = torch.randn(1, 3, 4, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ops.prototypes(X, LABELS, "3"), "num_classes is of type str, expected an integer"),
        (lambda: ops.prototypes(X, LABELS, 2**62), "num_classes is 4611686018427387904, expected 0 … 2³¹ − 1"),
        (lambda: ops.prototypes(X, LABELS, 3, [True]), "mask must be a torch.Tensor, got list"),
        (lambda: ops.pairwise_distance(X, X, temperature=[1]), "temperature is of type list, expected a number"),
        (lambda: ops.svm_solve(X, LABELS, 3, C={}), "C is of type dict, expected a number"),
        (lambda: ops.ridge_head(X, LABELS, X, 3, regularization="1"), "regularization is of type str"),
        (lambda: ops.inner_update(X, [X], 0.1), "params is of type Tensor, expected a list of tensors"),
        (lambda: ops.inner_update([X], [X], ["a"]), r"lr\[0\] is of type str, expected a number"),
        (lambda: loss(adapt=torch.tensor(1.0)), "adapt is tensor.*expected a parameter's name"),
        (lambda: loss(inner_steps=10**9), "inner_steps is 1000000000, expected an integer from 0 to 1,000,000"),
        (lambda: loss(step_weights=3), "step_weights is 3, expected inner_steps . 1 = 2 numbers"),
        (lambda: loss(inner_lr="a"), "inner_lr is of type str, expected a number"),
    ],
)
def test_things_that_are_no_numbers_are_named(call: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        call()


def loss(model: nn.Module | None = None, **options: Any) -> torch.Tensor:
    tasks = TaskBatch(X, LABELS, X, LABELS)
    return innerloop.maml_loss(model or nn.Linear(4, 3), tasks, **{"inner_lr": 0.1, **options})


# --- autocast -------------------------------------------------------------------------------------


def test_under_autocast_the_torch_engine_runs_and_gradients_are_float32() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        by_default, by_torch = loss(model), loss(model, engine="torch")
        with pytest.raises(ValueError, match="engine is 'native', but autocast is enabled"):
            loss(model, engine="native")
    assert torch.equal(by_default, by_torch)
    assert not torch.equal(by_default, loss(model))  # it did compute in bfloat16
    torch.testing.assert_close(by_default, loss(model), rtol=0.05, atol=0)
    by_default.backward()
    assert all(parameter.grad.dtype == torch.float32 for parameter in model.parameters())


def test_under_autocast_a_native_op_takes_float32_alone() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = nn.Linear(4, 4)(X)
        assert ops.prototypes(X, LABELS, 3).dtype == torch.float32
        with pytest.raises(TypeError, match=r"dtype torch\.bfloat16.*autocast made it; give embeddings\.float\(\)"):
            ops.prototypes(half, LABELS, 3)


# --- the checks of ./dev reliability that take seconds --------------------------------------------


def test_damaged_checkpoints() -> None:
    assert checkpoints.damage(6, seed=1) == []


def test_full_disks() -> None:
    try:
        assert checkpoints.full_disk(1, seed=1) == []
    except PermissionError as error:
        pytest.skip(str(error))


def test_eight_python_threads() -> None:
    assert repeats.python_threads(8, 3) == []


def test_rows_of_tests_name_what_failed_and_why_a_test_was_skipped(tmp_path: Path) -> None:
    # One of each outcome. The skip is the planted one: that a row says how many tests did not run, and why.
    file = tmp_path / "test_planted.py"
    file.write_text(
        "import pytest\n\n"
        "def test_good():\n    pass\n\n"
        "def test_bad():\n    assert 1 == 2\n\n"
        "def test_left_out():\n    pytest.skip('no disk')\n"
    )
    outcome = suite.run(suite.Tests("planted", (str(file),)), slow=False)
    assert outcome.failures == ["test_planted::test_bad: assert 1 == 2"]
    assert str(outcome) == "tests: 1 passed, 1 skipped (no disk)"
    (failure,) = suite.run(suite.Tests("planted", (f"{file}::test_renamed",)), slow=False).failures
    assert "not found" in failure


@pytest.mark.parametrize("name", suite.TESTS)
def test_rows_of_tests_exist(name: str) -> None:
    for test in suite.TESTS[name].names:
        file, _, function = test.partition("::")
        source = (Path(__file__).parent / file).read_text(encoding="utf-8")
        assert not function or f"\ndef {function}(" in source, test
