"""Names that are not here come from learn2learn itself, where it is installed."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any


def names_of(package: str) -> Callable[[str], Any]:
    """A module's ``__getattr__`` that looks in learn2learn's module of that name.

    Raises (the function returned):
        AttributeError: learn2learn has no such name, or cannot be imported, which is then the cause.
    """

    def find(name: str) -> Any:
        here = package.replace("learn2learn", "innerloop.compat.learn2learn", 1)
        if name.startswith("_"):  # what Python and its tools ask any module for
            raise AttributeError(f"module {here!r} has no attribute {name!r}")
        try:
            peer = import_module(package)
        except Exception as error:  # its import runs all of learn2learn, gym and torchvision included
            raise AttributeError(
                f"module {here!r} has no attribute {name!r}, and learn2learn, which may have it, cannot be imported: "
                f"{type(error).__name__}: {error}"
            ) from error
        return getattr(peer, name)

    return find
