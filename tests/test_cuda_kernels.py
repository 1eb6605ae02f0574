"""./dev cuda-kernels --check: a kernel that spills, or that the table lacks, fails."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

import cuda_kernels

pytestmark = pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")

# Where a number is in the array is known when the kernel runs, so that no register can hold it.
WITH_A_STACK_FRAME = """
__global__ void planted(const int* where, float* out) {
  float numbers[64];
  for (int i = 0; i < 64; ++i) numbers[i] = out[i];
  for (int i = 0; i < 64; ++i) out[i] = numbers[where[i]];
}
"""
# Every sum is needed to the end, and the registers of a block of 1024 threads are not enough for 128 of them.
WITH_SPILLS = """
__global__ void __launch_bounds__(1024) planted(const float* x, float* out) {
  float sums[128];
#pragma unroll
  for (int i = 0; i < 128; ++i) sums[i] = x[i];
  for (int k = 0; k < 100; ++k) {
#pragma unroll
    for (int i = 0; i < 128; ++i) sums[i] += x[k] * sums[(i + 1) % 128];
  }
#pragma unroll
  for (int i = 0; i < 128; ++i) out[i] = sums[i];
}
"""
GOOD = "__global__ void planted(float* out) { out[threadIdx.x] = 0; }"


def checked(source: str, table: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    """The exit status of the check on a project whose one kernel is that source."""
    (place / "csrc" / "cuda").mkdir(parents=True)
    (place / "csrc" / "cuda" / "planted.cu").write_text(source)
    monkeypatch.setattr(cuda_kernels, "ROOT", place)
    monkeypatch.setattr(cuda_kernels, "TABLE", place / "table.md")
    cuda_kernels.TABLE.write_text(table)
    with pytest.raises(SystemExit) as exit:
        cuda_kernels.main(check=True)
    return int(str(exit.value.code))


def test_a_kernel_with_registers_enough_passes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert checked(GOOD, "| `planted` |", tmp_path, monkeypatch) == 0
    assert capsys.readouterr().out == "1 kernels, 7 architectures, 0 faults\n"


@pytest.mark.parametrize(
    ("source", "fault"),
    [
        (WITH_A_STACK_FRAME, r"planted spills 0 bytes and has a stack frame of 256"),
        (WITH_SPILLS, r"planted spills [1-9]\d* bytes"),
    ],
    ids=["a stack frame", "spills"],
)
def test_a_kernel_without_fails(
    source: str, fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert checked(source, "| `planted` |", tmp_path, monkeypatch) == 1
    assert re.match(fault, capsys.readouterr().out)


def test_a_kernel_that_the_table_lacks_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert checked(GOOD, "| `another` |", tmp_path, monkeypatch) == 1
    assert "lacks planted: ./dev cuda-kernels" in capsys.readouterr().out
