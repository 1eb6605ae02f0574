"""Rows of the table that tests of the suite fill: which they are, and how they went."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from xml.etree import ElementTree


@dataclass(frozen=True)
class Tests:
    """names: as pytest is given them, from the folder tests/; one that no longer exists is a failure."""

    what: str
    names: tuple[str, ...]


TESTS = {
    "processes": Tests("several processes", ("test_distributed.py",)),
    "interrupts": Tests(
        "Ctrl-C, in a native call and in training",
        (
            "test_native_engine.py::test_signal_handlers_run_between_the_tasks_of_a_call",
            "test_training.py::test_ctrl_c_then_resume_is_the_undisturbed_run",
            "test_training.py::test_a_second_ctrl_c_does_not_wait",
            "test_training.py::test_ctrl_c_on_the_command_line",
        ),
    ),
    "nan": Tests(
        "a task that is no number",
        (
            "test_training.py::test_a_loss_that_is_no_number_names_step_and_task",
            "test_training.py::test_a_task_that_is_no_number_shows_in_its_own_loss_alone",
            "test_training.py::test_a_bad_task_can_be_left_out_of_its_batch",
            "test_training.py::test_what_a_bad_task_left_in_buffers_is_taken_back",
            "test_training.py::test_a_batch_in_chunks_is_the_same_step",
            "test_training.py::test_without_any_good_task_training_stops",
            "test_training.py::test_a_gradient_that_is_no_number_changes_nothing",
            "test_training.py::test_a_validation_that_is_no_number_is_never_the_best",
        ),
    ),
    "workers": Tests(
        "DataLoader workers",
        (
            "test_native_engine.py::test_data_loader_workers",
            "test_sampler.py::test_a_task_is_the_same_whatever_the_number_of_workers",
        ),
    ),
    "files": Tests(
        "files that would run code or lead elsewhere",
        (
            "test_reliability.py::test_the_package_reads_no_pickle_and_unpacks_no_archive",
            "test_reliability.py::test_the_search_finds",
            "test_reliability.py::test_a_pickle_in_place_of_a_checkpoint_is_not_run",
            "test_checkpoint.py::test_a_file_that_is_no_whole_checkpoint_is_named_and_changes_nothing",
            "test_reliability.py::test_a_pickle_in_place_of_a_data_cache_is_not_run",
            "test_reliability.py::test_names_in_an_archive_lead_nowhere",
            "test_image_folders.py::test_a_damaged_cache_is_made_anew",
            "test_registry.py::test_third_parties_can_be_turned_off",
        ),
    ),
    "autocast": Tests(
        "autocast",
        (
            "test_reliability.py::test_under_autocast_the_torch_engine_runs_and_gradients_are_float32",
            "test_reliability.py::test_under_autocast_a_native_op_takes_float32_alone",
            "test_native_engine.py::test_autocast_takes_the_torch_engine",
        ),
    ),
    "supply": Tests("source archive and wheel", ("test_distribution.py",)),
}


@dataclass
class Outcome:
    """failures: names of tests with what went wrong; skipped: how many tests, by reason."""

    passed: int = 0
    failures: list[str] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)

    def __str__(self) -> str:
        counts = [f"{self.passed} passed", *(f"{count} skipped ({why})" for why, count in self.skipped.items())]
        return f"tests: {', '.join(counts)}"


def run(tests: Tests, slow: bool) -> Outcome:
    """What became of tests; slow: of those marked slow too."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        done = subprocess.run(
            [sys.executable, "-m", "pytest", f"--junit-xml={report}", *["--slow"] * slow, *tests.names],
            cwd=Path(__file__).parents[1],
            capture_output=True,
            text=True,
        )
        cases = list(ElementTree.parse(report).iter("testcase")) if report.exists() else []
    outcome = Outcome()
    for case in cases:
        # Before the file's name comes a path, from wherever pytest finds a root.
        name = f"{case.get('classname', '').rpartition('.')[2]}::{case.get('name')}"
        wrong = [*case.iter("failure"), *case.iter("error")]
        skipped = case.find("skipped")
        if wrong:
            outcome.failures.append(f"{name}: {wrong[0].get('message', '')[:300]}")
        elif skipped is not None:
            outcome.skipped[skipped.get("message", "")] += 1
        else:
            outcome.passed += 1
    if not outcome.failures and (done.returncode != 0 or not cases):
        outcome.failures.append(f"pytest ended with {done.returncode}: {(done.stdout + done.stderr)[-500:]}")
    return outcome
