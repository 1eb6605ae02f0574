"""Loads the native libraries: every other module that needs one imports this first."""

from __future__ import annotations

import ctypes
import importlib.util
import os

import torch

_HELP = (
    "innerloop's native library {name} {problem}. Reinstall it beside this torch ({torch}): "
    "pip install --no-build-isolation --force-reinstall --no-deps innerloop"
)


def _path(name: str) -> str | None:
    spec = importlib.util.find_spec(f"innerloop.{name}")
    return spec.origin if spec is not None else None


def _load(name: str, path: str | None) -> None:
    if path is None:
        raise ImportError(_HELP.format(name=name, problem="is missing", torch=torch.__version__))
    try:
        torch.ops.load_library(path)
    except OSError as error:
        problem = f"does not load ({error})"
        raise ImportError(_HELP.format(name=name, problem=problem, torch=torch.__version__)) from error


def _check_instruction_set(wish: str | None) -> None:
    known = ("baseline", "v3", "v4")
    if wish is not None and wish not in known:
        raise ImportError(f"the environment variable INNERLOOP_ISA is {wish!r}, expected one of {', '.join(known)}")


# The library reads it while it is loaded.
_check_instruction_set(os.environ.get("INNERLOOP_ISA"))

CPU_LIBRARY = _path("_C_cpu")
CUDA_LIBRARY = _path("_C_cuda")  # None where the package was built without nvcc

_load("_C_cpu", CPU_LIBRARY)

#: After an op ended with "interrupted by a signal": raises what the signal's handler raised (csrc/ops/interrupt.h).
raise_interrupt = ctypes.PyDLL(CPU_LIBRARY).innerloop_raise_interrupt
raise_interrupt.restype = None

# The CUDA library needs libtorch's CUDA parts at run time, so a CPU build of torch leaves it alone.
cuda_loaded = CUDA_LIBRARY is not None and torch.version.cuda is not None
if cuda_loaded:
    _load("_C_cuda", CUDA_LIBRARY)
