"""The harness of the benchmarks: gradients compared before anything is timed, and the command `innerloop bench`."""

from __future__ import annotations

import json
import math
import sysconfig
import venv
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from command_line import CommandLine
from innerloop.bench.race import Effort, check, measure
from innerloop.bench.rivals import ORACLE, OURS, RIVALS, Rival
from innerloop.bench.workloads import WORKLOADS, flops, has_batch_norm, make_arrays, make_model

SMALL = replace(WORKLOADS["sinusoid-k1"], tasks=2)
ONE_SAMPLE = Effort(0.0, 1, 1)


def ignore(_: str) -> None:
    pass


@pytest.mark.parametrize("rival", [OURS, "innerloop-op", "loop", "vmap-exact"])
@pytest.mark.parametrize("name", ["sinusoid-k5", "mlp784-k5", "omniglot-anil", "omniglot-first-order", "glyphs-k1"])
def test_the_rivals_that_torch_has_compute_the_same_gradient(name: str, rival: str) -> None:
    workload = replace(WORKLOADS[name], tasks=2, query=5)
    if RIVALS[rival].cannot(workload) is not None:
        assert RIVALS[rival].cannot(workload) == "has no BatchNorm"
        assert not has_batch_norm(workload)
        return
    loss, gradients = RIVALS[rival].make(workload, "float64")()
    expected_loss, expected = RIVALS[ORACLE].make(workload, "float64")()
    assert float(loss) == pytest.approx(float(expected_loss), rel=1e-12)
    for gradient, right in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient, right, rtol=1e-9, atol=1e-12)


def test_another_gradient_is_marked_and_a_failure_is_told() -> None:
    faults = ("differs", "cannot", "raises")
    rivals = {fault: Rival(fault, "wrong_rivals", options={"fault": fault}) for fault in faults}
    rows = check(SMALL, rivals, RIVALS[ORACLE], ignore)
    assert rows["differs"]["exact"] is False
    assert rows["differs"]["error"] == pytest.approx(1e-3)
    assert rows["cannot"]["failed"] == "has no such step"
    assert rows["raises"]["failed"] == "fails: RuntimeError: out of luck"


def test_a_rival_runs_in_its_environment(tmp_path: Path) -> None:
    venv.create(tmp_path / "own", with_pip=False)
    project, own = (sysconfig.get_path("platlib", vars=vars) for vars in (None, {"platbase": str(tmp_path / "own")}))
    (Path(own) / "project.pth").write_text(f"import site; site.addsitedir({project!r})")
    rivals = {
        name: Rival(name, "wrong_rivals", environment=tmp_path / name, options={"fault": "tells"})
        for name in ("own", "missing")
    }
    rows = check(SMALL, rivals, RIVALS[ORACLE], ignore)
    assert rows["own"]["failed"] == f"runs in {tmp_path / 'own'}"
    assert rows["missing"]["failed"] == "has no environment: benchmarks/peers.sh makes it"


def test_a_row_has_both_clocks_first_call_and_memory() -> None:
    rivals = {name: RIVALS[name] for name in (OURS, "innerloop-op")}
    rows = measure(SMALL, rivals, OURS, ONE_SAMPLE, ignore)
    for row in rows.values():
        assert row["samples"] == 1
        for spread in (row["milliseconds"], row["wall_milliseconds"]):
            assert 0 < spread["min"] <= spread["median"] <= spread["max"]
        assert row["first_seconds"] > 0
        assert math.isfinite(row["peak_megabytes"])
    assert rows["innerloop-op"]["ratio"]["median"] > 0


def test_workloads_are_always_the_same() -> None:
    for workload in (SMALL, replace(WORKLOADS["mlp784-k5"], tasks=2)):
        for one, other in zip(make_arrays(workload, "float32"), make_arrays(workload, "float32"), strict=True):
            assert (one == other).all()
        models = make_model(workload, "float32"), make_model(workload, "float32")
        for one, other in zip(*(model.parameters() for model in models), strict=True):
            assert one.equal(other)


def test_flops_are_those_of_the_recurrence() -> None:
    """Finn et al.'s regression net by hand: products of 40, 1600 and 40, of which the first reads data."""
    first, others = 2 * 40, 2 * (1600 + 40)
    of_support = first * (2 + 2) + others * (3 + 6)  # gradient, Hessian-vector product
    of_query = first * 2 + others * 3
    assert flops(SMALL) == 2 * 10 * (of_support + of_query)


@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("name", ["mlp784-k5", "mlp784-head", "omniglot-anil"])
def test_flops_are_those_that_torch_counts_in_the_loop(name: str, steps: int, first_order: bool) -> None:
    """Where the head alone is adapted the loop passes the body once, as the recurrence does. (Where a convolution is
    adapted by the second order, torch also computes a gradient for the images, which nobody reads.)"""
    head = replace(WORKLOADS["mlp784-k5"], adapt="head")
    workload = replace({**WORKLOADS, "mlp784-head": head}[name], tasks=2, query=5, steps=steps, first_order=first_order)
    step = RIVALS["loop"].make(workload, "float32")
    with FlopCounterMode(display=False) as counter:
        step()
    assert flops(workload) == counter.get_total_flops()


# --- the command --------------------------------------------------------------------------------


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> CommandLine:
    return CommandLine(monkeypatch, capsys)


def test_json_of_a_net_of_ones_own(run: CommandLine) -> None:
    sizes = ("--net-option", "hidden=8", "--input-shape", "1,4,4", "--tasks", 3, "--queries", 2)
    printed = json.loads(run("bench", "--net", "mlp", *sizes, "--rival", OURS, "--seconds", 0, "--json"))
    (result,) = printed["results"]
    row = result["rows"][OURS]
    assert result["heading"] == "mlp: T=3, 5+10, K=1"
    assert printed["machine"]["sgemm_gflops"] > 0
    assert result["flops"] > 0
    assert row["exact"]
    assert row["milliseconds"]["median"] > 0


def test_table(run: CommandLine) -> None:
    text = run("bench", "sinusoid-k1", "--rival", OURS, "--rival", "vmap-exact", "--seconds", 0)
    assert "sinusoid MLP 1-40-40-1: T=25, 10+10, K=1" in text
    assert "has no BatchNorm" in text
    assert "of torch.mm's" in text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["sinusoid-k2"], "no workload is called 'sinusoid-k2'"),
        (["sinusoid-k1", "--rival", "vmop"], "no rival is called 'vmop'"),
        (["sinusoid-k1", "--net", "mlp"], "give names of workloads, or --net"),
        (["--net", "mlpp"], "no model is called 'mlpp'"),
        (["--net", "innerloop.models:mlpp"], "the module innerloop.models has no 'mlpp'"),
        (["--net", "mlp", "--tasks", "0"], "tasks is 0, expected at least 1"),
        (["--net", "mlp", "--net-option", "width=3"], "the net mlp has no option 'width'"),
    ],
)
def test_usage_errors(run: CommandLine, arguments: list[str], words: str) -> None:
    assert words in run("bench", *arguments, code=2)
