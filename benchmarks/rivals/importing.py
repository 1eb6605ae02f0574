"""Importing a part of an old package whose umbrella module no longer imports."""

from __future__ import annotations

import sys
from importlib.machinery import PathFinder
from types import ModuleType


def skip_umbrella(*packages: str) -> None:
    """Let ``import package.part`` work without running package/__init__.py, unless that has been done already.

    Those of learn2learn and torchmeta import all of the package: gym, torchvision, h5py. The parts that are measured
    need none of these.
    """
    for name in packages:
        if name in sys.modules:
            continue
        parent = sys.modules.get(name.rpartition(".")[0])
        spec = PathFinder.find_spec(name, parent.__path__ if parent else None)
        if spec is None:
            raise ModuleNotFoundError(f"{name} is not here: benchmarks/peers.sh makes it an environment", name=name)
        module = ModuleType(name)
        module.__path__ = list(spec.submodule_search_locations or ())
        sys.modules[name] = module
