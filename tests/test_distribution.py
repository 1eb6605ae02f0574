"""What is handed on: the source archive has all that a build takes, and nothing else; it and the wheel made of it work
where they are installed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NAME = "innerloop-0.1.0"
#: As ./dev has it.
TORCH = os.environ.get("INNERLOOP_TORCH", "torch==2.13.0").split()

#: Our own licence and those of what comes along: DejaVu's glyphs, torch's headers, pybind11, the static CUDA runtime.
LICENCES = {
    "LICENSE", "licenses/cuda-runtime.txt", "licenses/pybind11.txt", "licenses/torch.txt",
    "python/innerloop/data/glyphs.LICENSE.txt",
}  # fmt: skip


def run(*command: str | Path, folder: Path, **environment: str) -> str:
    """Runs a command in a folder that has nothing to do with the sources; returns what it printed."""
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        list(map(str, command)), cwd=folder, env={**variables, "NO_COLOR": "1", "COLUMNS": "200", **environment},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sdist")
    build = "import sys; from scikit_build_core.build import build_sdist; build_sdist(sys.argv[1])"
    run(sys.executable, "-c", build, folder, folder=ROOT, SOURCE_DATE_EPOCH="1700000000")
    return folder / f"{NAME}.tar.gz"


def paths_in(archive: Path) -> set[str]:
    with tarfile.open(archive) as files:
        return {path.removeprefix(f"{NAME}/") for path in files.getnames()}


# The tests come along in the archive, and pass where it is unpacked.
@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="an unpacked archive, in which there is no git to ask")
def test_source_archive_is_what_git_knows(sdist: Path) -> None:
    listed = run("git", "ls-files", "--cached", "--others", "--exclude-standard", folder=ROOT).splitlines()
    expected = {path for path in listed if (ROOT / path).is_file() and not path.startswith(".ci/")}
    assert paths_in(sdist) == expected | {"PKG-INFO"}
    assert LICENCES | {"dev", "CMakeLists.txt", "requirements-release.txt"} <= expected


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Made by ./dev wheel from the source archive alone, with tools installed for it; without CUDA, to be quick."""
    folder = tmp_path_factory.mktemp("release")
    with tarfile.open(sdist) as files:
        files.extractall(folder, filter="data")
    project = folder / NAME
    run("./dev", "wheel", "-C", "cmake.define.INNERLOOP_CUDA=OFF", folder=project,
        PYTHON=sys.executable, SOURCE_DATE_EPOCH="1700000000", TMPDIR=str(folder))  # fmt: skip
    assert (project / "dist" / sdist.name).read_bytes() == sdist.read_bytes()
    (made,) = (project / "dist").glob("*.whl")
    yield made
    shutil.rmtree(project)  # a gigabyte of tools


@pytest.mark.slow
def test_wheel(wheel: Path) -> None:
    assert "-manylinux_" in wheel.name
    package = ROOT / "python" / "innerloop"
    sources = {path.relative_to(package.parent) for path in package.rglob("*") if path.suffix not in (".md", ".pyc")}
    with zipfile.ZipFile(wheel) as files:
        contents = {path: files.read(path) for path in files.namelist() if not path.endswith("/")}
    info = f"{NAME}.dist-info"
    native = {path for path in contents if ".so" in path}
    assert {path.split(".")[0] for path in native} == {"innerloop/_C_cpu", "innerloop/_native"}  # none of torch's
    assert {path for path in contents if not path.startswith(info)} - native == {
        str(path) for path in sources if (package.parent / path).is_file()
    }
    prefix = f"{info}/licenses/"
    assert {path.removeprefix(prefix) for path in contents if path.startswith(prefix)} == LICENCES
    # Nothing of the folders that it was built in is in the libraries.
    release = wheel.parents[2]
    for path in native:
        assert str(release).encode() not in contents[path], path
        assert b"site-packages" not in contents[path], path


@pytest.mark.slow
@pytest.mark.parametrize("distribution", ["wheel", "sdist"])
def test_installed(distribution: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    file = request.getfixturevalue(distribution)
    environment = tmp_path / "environment"
    venv.create(environment, with_pip=True)
    python = environment / "bin" / "python"
    run(python, "-m", "pip", "install", "--quiet", *TORCH, folder=tmp_path)
    # pip builds what comes as sources in an environment that it makes. Quick to compile rather than to run.
    quick = ["cmake.define.INNERLOOP_CUDA=OFF", "cmake.define.CMAKE_CXX_FLAGS_RELEASE=-O0"]
    settings = [f"--config-settings={option}" for option in quick] if distribution == "sdist" else []
    run(python, "-m", "pip", "install", "--quiet", *settings, file, folder=tmp_path)

    script = shutil.copy(Path(__file__).with_name("installed.py"), tmp_path)
    run(python, "-W", "error", script, folder=tmp_path)
    innerloop = environment / "bin" / "innerloop"
    assert "maml" in run(innerloop, "algorithms", folder=tmp_path)
    assert "conv" in run(innerloop, "explain", "--model", "conv4", folder=tmp_path)
    shutil.rmtree(environment)
