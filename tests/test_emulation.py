"""The emulation that runs CUDA kernels without a GPU: it computes what a GPU would, and sanitizers see through it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import emulated

MACHINE = Path(__file__).parent / "emulation" / "machine.cpp"


def run_machine(flavour: str, *definitions: str) -> subprocess.CompletedProcess[str]:
    program = emulated.compile_program(MACHINE, flavour, *definitions)
    return subprocess.run([program], capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("flavour", emulated.FLAGS)
def test_barriers_shuffles_atomics_and_limits(flavour: str) -> None:
    done = run_machine(flavour)
    assert (done.returncode, done.stdout, done.stderr) == (0, "right\n", "")


def test_a_missing_barrier_is_a_reported_race() -> None:
    done = run_machine("tsan", "-DPLANT_RACE")
    assert done.returncode != 0
    assert "ThreadSanitizer: data race" in done.stderr
    assert "sums_of_squares" in done.stderr


def test_an_index_beyond_shared_memory_is_caught() -> None:
    done = run_machine("asan", "-DPLANT_INDEX")
    assert done.returncode != 0
    assert "AddressSanitizer: heap-buffer-overflow" in done.stderr
    assert "sums_of_squares" in done.stderr


def test_a_barrier_that_some_threads_never_reach_is_an_error() -> None:
    done = run_machine("plain", "-DPLANT_EXIT")
    assert done.returncode == 1
    assert done.stdout == "emulation: some threads wait at a barrier that others of their block never reach\n"


@pytest.mark.sanitizers
@pytest.mark.parametrize("flavour", ["tsan", "asan"])
def test_every_op_under_sanitizers(flavour: str) -> None:
    """The op cases on emulated kernels, in a process of their own that the sanitizer watches."""
    done = run_under_sanitizer(flavour, emulated.build(flavour))
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout == f"{len(emulated.operators())} ops\n"


@pytest.mark.sanitizers
@pytest.mark.parametrize(
    ("flavour", "right", "wrong", "report"),
    [
        ("tsan", "__syncthreads();\n      A sum = 0;", "A sum = 0;", "ThreadSanitizer: data race"),
        ("asan", "i < rows.count &&", "i <= rows.count &&", "AddressSanitizer: heap-buffer-overflow"),
    ],
    ids=["a missing barrier", "an index out of bounds"],
)
def test_a_fault_planted_in_a_kernel_is_caught(
    flavour: str, right: str, wrong: str, report: str, tmp_path: Path
) -> None:
    csrc = shutil.copytree(emulated.CSRC, tmp_path / "csrc")
    kernel = csrc / "cuda" / "pair_sums.h"
    text = kernel.read_text()
    assert text.count(right) == 1
    kernel.write_text(text.replace(right, wrong))
    done = run_under_sanitizer(flavour, emulated.build_changed(flavour, csrc, "cuda/squared_distances.cu"))
    assert done.returncode != 0
    assert report in done.stderr
    assert "pair_sums.h" in done.stderr


def run_under_sanitizer(
    flavour: str, library: Path, main: Path = Path(emulated.__file__)
) -> subprocess.CompletedProcess[str]:
    compiler = emulated.compiler()[-1]
    names = ["libtsan.so"] if flavour == "tsan" else ["libasan.so", "libubsan.so"]
    paths = [subprocess.check_output([compiler, f"-print-file-name={name}"], text=True).strip() for name in names]
    environment = {**os.environ, "LD_PRELOAD": " ".join(paths), "ASAN_OPTIONS": "detect_leaks=0"}
    program = [sys.executable, str(main), str(library)]
    return subprocess.run(program, env=environment, capture_output=True, text=True)
