"""The kernels under csrc/kernels, in every instruction set that this CPU has, against naive loops."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TOLERANCE = {"float64": 1e-12, "float32": 1e-5}


def instruction_sets() -> list[str]:
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    return ["baseline"] + ["v3"] * (" avx2 " in flags) + ["v4"] * (" avx512vl " in flags)


@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
@pytest.mark.parametrize("isa", instruction_sets())
def test_kernels_agree_with_naive_loops(isa: str, tmp_path: Path) -> None:
    sources = [ROOT / f"csrc/kernels/{name}.cpp" for name in ("gemm", "winograd", "convolution", "chosen_patches")]
    sources.append(ROOT / "tests/kernels/check.cpp")
    options = ["-std=gnu++20", "-O2", "-Wno-psabi", f"-DINNERLOOP_ISA={isa}", f"-I{ROOT / 'csrc'}"]
    if isa != "baseline":
        options.append(f"-march=x86-64-{isa}")
    compiler = [*([shutil.which("ccache")] if shutil.which("ccache") else []), "c++"]
    compilations = [
        subprocess.Popen([*compiler, *options, "-c", source, "-o", tmp_path / f"{source.stem}.o"], cwd=ROOT)
        for source in sources
    ]
    assert [compilation.wait() for compilation in compilations] == [0] * len(sources)
    program = tmp_path / "check"
    subprocess.run(["c++", *tmp_path.glob("*.o"), "-o", program], check=True)
    result = subprocess.run([program], capture_output=True, text=True, check=True)

    lines = [line.rsplit(" ", 1) for line in result.stdout.splitlines()]
    errors = {name: float(error) for name, error in lines}
    assert len(errors) > 400
    for tiles in ("tile00", "tile22", "tile23", "tile33", "tile44"):  # of the forward pass, and of everything else
        assert any(name.endswith(tiles) for name in errors), f"no case of {tiles}"
    assert any("chosen_patches" in name for name in errors) == (isa == "v4")
    wrong = {name: error for name, error in errors.items() if not error <= TOLERANCE[name.split()[0]]}
    assert not wrong
