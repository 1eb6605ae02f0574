"""The CUDA ops without a GPU: csrc/cuda, unchanged, compiled by the C++ compiler into a library whose kernels run on
the CPU (tests/emulation). It registers its ops for CPU tensors in a namespace of their own, innerloop_emulated."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

import innerloop._library  # noqa: F401 (defines the ops)

ROOT = Path(__file__).parent.parent
CSRC = ROOT / "csrc"
PLACE = ROOT / "build" / "emulation"
NAMESPACE = "innerloop_emulated"

FLAGS = {
    "plain": ("-O1",),
    "tsan": ("-O1", "-g", "-fsanitize=thread"),
    "asan": ("-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"),
}


def compiler() -> list[str]:
    ccache = shutil.which("ccache")
    return [*([ccache] if ccache else []), os.environ.get("CXX", "c++")]


def compile_program(source: Path, flavour: str, *definitions: str) -> Path:
    """An executable of one file that needs the emulation alone."""
    command = [*compiler(), *_flags(flavour), *definitions, str(source), "-pthread"]
    program = _place(flavour, source.stem, command, [source])
    return _made(program, lambda to: _run([*command, "-o", str(to)]))


def build(flavour: str = "plain") -> Path:
    """The library of all CUDA sources. Files that have not changed are not compiled again."""
    sources = sorted([*(CSRC / "cuda").rglob("*.cu"), *(CSRC / "program").glob("*.cpp")])
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(partial(_compiled, flavour), sources))
    command = _link(flavour, objects)
    library = _place(flavour, "library.so", command, objects)
    return _made(library, lambda to: _run([*command, "-o", str(to)]))


def build_changed(flavour: str, csrc: Path, source: str) -> Path:
    """The library of one source of a changed copy of csrc/, beside which it is put."""
    compiled, library = csrc.with_name("changed.o"), csrc.with_name("changed.so")
    _run([*_compile(flavour, csrc / source, csrc), "-o", str(compiled)])
    _run([*_link(flavour, [compiled]), "-o", str(library)])
    return library


def load(library: Path) -> dict[str, Callable[..., Any]]:
    """The library's ops, by their names."""
    names = [name.split("::")[1] for name in torch._C._dispatch_get_all_op_names() if name.startswith("innerloop::")]
    schemas = torch.library.Library(NAMESPACE, "FRAGMENT")
    for name in {name.split(".")[0] for name in names}:
        schemas.define(str(getattr(torch.ops.innerloop, name).default._schema).removeprefix("innerloop::"))
    _kept.append(schemas)
    torch.ops.load_library(str(library))
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    namespace = getattr(torch.ops, NAMESPACE)
    return {name: getattr(namespace, name) for name in names if has_kernel(f"{NAMESPACE}::{name}", "CPU")}


_kept: list[torch.library.Library] = []  # a torch.library.Library takes what it defined with it


@cache
def operators() -> dict[str, Callable[..., Any]]:
    return load(build())


@contextmanager
def in_place_of_cpu_ops(ops: dict[str, Callable[..., Any]]) -> Iterator[None]:
    """Makes ops the CPU kernels of torch.ops.innerloop: everything above them then runs on the emulated kernels."""
    library = torch.library.Library("innerloop", "IMPL")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Warning only once for all operators")  # of what is overridden here
        for name, op in ops.items():
            library.impl(name, op, "CPU", allow_override=True)
    try:
        yield
    finally:
        library._destroy()


def failing_launches(name: str, call: Callable[[], object]) -> int:
    """Plants a fault in each launch of an emulated op, one call after another, and finds that every one becomes an
    error which names the op. Returns how many there were."""
    for launch in range(1000):
        os.environ["EMULATION_FAILING_LAUNCH"] = str(launch)
        try:
            call()
        except RuntimeError as error:
            if f"{name}: invalid configuration argument" not in str(error):
                raise
        else:
            return launch
        finally:
            del os.environ["EMULATION_FAILING_LAUNCH"]
    raise AssertionError("launches without end")


def _flags(flavour: str, csrc: Path = CSRC) -> list[str]:
    return [
        *("-std=c++20", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"),
        *FLAGS[flavour],
        *("-I", str(ROOT / "tests" / "emulation"), "-I", str(csrc)),
    ]


def _compile(flavour: str, source: Path, csrc: Path = CSRC) -> list[str]:
    torch_include = str(Path(torch.__file__).parent / "include")
    return [
        *compiler(),
        *_flags(flavour, csrc),
        *("-isystem", torch_include, "-DTORCH_TARGET_VERSION=0x020a000000000000ULL"),
        *("-c", "-x", "c++", str(source)),
    ]


def _link(flavour: str, objects: list[Path]) -> list[str]:
    libtorch = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    return [*compiler(), *_flags(flavour), "-shared", *map(str, objects), str(libtorch), "-pthread"]


def _compiled(flavour: str, source: Path) -> Path:
    command = _compile(flavour, source)
    return _made(_place(flavour, source.stem, command, [source]), lambda to: _run([*command, "-o", str(to)]))


@cache
def _headers() -> bytes:
    """What every source may include."""
    found = sorted([*CSRC.rglob("*.h"), *(ROOT / "tests" / "emulation").glob("*.h")])
    return b"".join(hashlib.sha256(path.read_bytes()).digest() for path in found) + torch.__version__.encode()


def _place(flavour: str, name: str, command: list[str], inputs: list[Path]) -> Path:
    """Where the result of a command on inputs belongs: another place for every state of what it depends on."""
    key = hashlib.sha256(_headers() + "\0".join(command).encode())
    for path in inputs:
        key.update(path.read_bytes())
    return PLACE / flavour / f"{name}-{key.hexdigest()[:16]}"


def _made(path: Path, make: Callable[[Path], None]) -> Path:
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        for former in path.parent.glob(f"{path.name.rsplit('-', 1)[0]}-*"):
            former.unlink(missing_ok=True)
        unfinished = path.with_name(f"unfinished-{os.getpid()}-{path.name}")
        make(unfinished)
        unfinished.rename(path)
    return path


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")


def main(library: str) -> None:
    """The small op cases on the kernels of a library, for a process that a sanitizer watches."""
    import op_cases

    ops = load(Path(library))
    with in_place_of_cpu_ops(ops):
        for case in (*op_cases.SMALL_CASES, *op_cases.FIRST_ORDER_CASES, op_cases.UNROLLED_CASES[0]):
            op_cases.compare(case)
    print(len(ops), "ops")


if __name__ == "__main__":
    main(*sys.argv[1:])
