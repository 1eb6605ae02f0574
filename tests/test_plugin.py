"""tests/plugin as its users have it: installed by pip, and used through the command line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PLUGIN = Path(__file__).parent / "plugin"


def install(distribution: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A throw-away target folder that pip installed a distribution into."""
    target = tmp_path_factory.mktemp("site")
    source = tmp_path_factory.mktemp("source") / "plugin"
    subprocess.run(["cp", "-r", str(distribution), str(source)], check=True)  # building must not write into the sources
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "--target", str(target), str(source)], check=True)
    return target


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return install(PLUGIN, tmp_path_factory)


def innerloop_cli(site: Path | None, *arguments: str, code: int = 0, **environment: str) -> str:
    """Run `innerloop ARGUMENTS` with a folder of plug-ins; returns what it printed."""
    paths = {"PYTHONPATH": str(site)} if site else {}
    variables = {**os.environ, "COLUMNS": "200", "NO_COLOR": "1", **paths, **environment}
    done = subprocess.run(
        [sys.executable, "-m", "innerloop", *arguments], env=variables, capture_output=True, text=True, check=False
    )
    output = done.stdout + done.stderr
    assert done.returncode == code, output
    assert "Traceback" not in output
    return output


def line_with(text: str, *words: str) -> str:
    return next(line for line in text.splitlines() if all(word in line for word in words))


def test_listed_with_distribution_version_summary_and_state(installed: Path) -> None:
    line = line_with(innerloop_cli(installed, "algorithms"), "nearest_sample")
    for part in ("innerloop-example", "1.2.3", "nearest support embedding", "ok"):
        assert part in line
    line = line_with(innerloop_cli(installed, "datasets"), "blobs")
    for part in ("innerloop-example", "1.2.3", "Points around random class centres", "ok"):
        assert part in line


def test_its_own_options_are_in_the_help(installed: Path) -> None:
    text = innerloop_cli(installed, "train", "nearest_sample", "--help")
    assert "--temperature" in text
    assert "distances are divided by this" in text


def test_trained_and_evaluated(installed: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    innerloop_cli(
        installed, "train", "nearest_sample", "--data", "blobs", "--data-option", "spread=0.2", "--model", "mlp",
        "--temperature", "0.5", "--steps", "20", "--run", str(run),
    )  # fmt: skip
    config = json.loads((run / "config.json").read_text())
    assert config["algorithm"]["options"]["temperature"] == 0.5
    assert config["data"]["options"]["spread"] == 0.2
    record = json.loads(innerloop_cli(installed, "evaluate", str(run), "--json"))
    assert record["episodes"] >= 600
    assert record["mean"] > 0.9


def test_a_wrong_option_names_the_nearest(installed: Path) -> None:
    assert "--temperature" in innerloop_cli(
        installed, "train", "nearest_sample", "--data", "blobs", "--temperatur", "1", code=2
    )
    text = innerloop_cli(installed, "train", "nearest_sample", "--data", "blobs", "--data-option", "spred=1", code=2)
    assert "spread" in text


def test_turned_off(installed: Path) -> None:
    assert "nearest_sample" not in innerloop_cli(installed, "algorithms", INNERLOOP_PLUGINS="off")
    innerloop_cli(installed, "train", "nearest_sample", "--data", "blobs", code=2, INNERLOOP_PLUGINS="off")


def fake_distribution(site: Path, name: str, entry: str, source: str) -> None:
    info = site / f"{name}-0.1.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 0.1\n")
    (info / "entry_points.txt").write_text(f"[innerloop.algorithms]\n{entry}\n")
    (site / f"{entry.split('=')[1].split(':')[0].strip()}.py").write_text(source)


@pytest.mark.parametrize(
    ("entry", "source", "asked", "code", "message"),
    [
        ("bad = bad_one:Bad", "raise RuntimeError('boom')", "bad", 1, "'bad' of broken-dist 0.1 cannot be loaded"),
        ("bad = bad_two:Bad", "import no_such_package", "bad", 1, "No module named 'no_such_package'"),
        ("maml = bad_three:Bad", "class Bad: ...", "maml", 1, "say which: 'broken-dist:maml' or 'innerloop:maml'"),
        ("bad = bad_four:Bad", "class Bad: ...", "bda", 2, "Did you mean 'bad'"),
    ],
    ids=["broken", "missing dependency", "clash", "unknown"],
)
def test_each_failure_is_an_error_of_one_plugin_alone(
    tmp_path: Path, entry: str, source: str, asked: str, code: int, message: str
) -> None:
    fake_distribution(tmp_path, "broken-dist", entry, source)
    assert "broken-dist" in innerloop_cli(tmp_path, "algorithms")
    assert message in innerloop_cli(tmp_path, "train", asked, "--data", "glyphs", code=code)
    innerloop_cli(tmp_path, "train", "protonet", "--help")
