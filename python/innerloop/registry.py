"""Names to plug-ins: algorithms and data sets found through entry points.

Discovery reads the metadata of installed distributions and imports nothing; :meth:`Registry.get` imports the one
plug-in asked for. The built-ins are found the same way.
"""

from __future__ import annotations

import difflib
import inspect
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Generic, TypeVar

Base = TypeVar("Base")

OWN_DISTRIBUTION = "innerloop"


class PluginError(RuntimeError):
    """An installed plug-in that cannot be used; chained from what went wrong in it."""


class UnknownNameError(LookupError):
    """A name that no plug-in has."""


@dataclass(frozen=True)
class Plugin:
    """One entry point of a group: what is known of it without importing it."""

    name: str
    distribution: str
    version: str
    entry_point: EntryPoint

    @property
    def is_builtin(self) -> bool:
        return self.distribution == OWN_DISTRIBUTION

    def __str__(self) -> str:
        return f"{self.name!r} of {self.distribution} {self.version}"


def nearest(name: str, names: list[str]) -> str:
    """A sentence that points from a mistyped name to the names there are."""
    matches = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    hint = f" Did you mean {' or '.join(map(repr, matches))}?" if matches else ""
    return f"{hint} There are: {', '.join(names) if names else 'none'}."


def check_choice(value: object, argument: str, choices: Sequence[str]) -> None:
    """Refuse what is none of some names.

    Raises:
        ValueError: it names the argument, and the nearest of the names.
    """
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{argument} is {value!r}.{nearest(str(value), list(choices))}")


class Registry(Generic[Base]):
    """The plug-ins of one entry-point group.

    Args:
        group: the entry-point group. kind: what to call a member in messages.
        base: returns the class that members derive from (a function, so that it need not be imported yet).
    """

    def __init__(self, group: str, kind: str, base: Callable[[], type[Base]]) -> None:
        self.group = group
        self.kind = kind
        self._base = base
        self._registered: dict[str, type[Base]] = {}

    def plugins(self) -> list[Plugin]:
        """Every installed plug-in, sorted by name; third parties only unless INNERLOOP_PLUGINS=off."""
        third_parties = os.environ.get("INNERLOOP_PLUGINS", "").lower() != "off"
        found: dict[tuple[str, str], Plugin] = {}
        for entry_point in entry_points(group=self.group):
            # A distribution seen twice on sys.path is one plug-in; the first one wins, as for imports.
            distribution = entry_point.dist
            owner = distribution.name if distribution is not None else "unknown"
            version = distribution.version if distribution is not None else "?"
            plugin = Plugin(entry_point.name, owner, version, entry_point)
            if plugin.is_builtin or third_parties:
                found.setdefault((plugin.name, plugin.distribution), plugin)
        return sorted(found.values(), key=lambda plugin: (plugin.name, plugin.distribution))

    def available(self) -> list[str]:
        """Sorted names, the registered ones included; nothing is imported."""
        return sorted({plugin.name for plugin in self.plugins()} | set(self._registered))

    def register(self, name: str, cls: type[Base]) -> None:
        """Make a class known by name in this process, for a notebook; a package uses an entry point instead.

        Registering a name again replaces what this process registered before, as re-running a notebook cell does.

        Raises:
            TypeError: cls does not derive from the contract's class.
            ValueError: the name belongs to an installed plug-in, or holds a ':'.
        """
        self._check_class(cls, f"the class registered as {name!r}")
        if ":" in name or not name:
            raise ValueError(f"name is {name!r}, expected a non-empty name without ':'")
        owners = [plugin for plugin in self.plugins() if plugin.name == name]
        if owners:
            raise ValueError(f"name {name!r} belongs to an installed {self.kind}: {owners[0]}; choose another")
        self._registered[name] = cls

    def get(self, name: str | type[Base]) -> type[Base]:
        """The class of that name; imports it. ``"distribution:name"`` picks one of several; a class passes through.

        Raises:
            UnknownNameError: no such name; the message has the nearest matches and the list.
            PluginError: it does not import, is not of the right kind, or several distributions share the name.

        Examples:
            >>> innerloop.get("maml")
            <class 'innerloop.algorithms.maml.MAML'>
            >>> innerloop.get("innerloop:protonet")
            <class 'innerloop.algorithms.protonet.ProtoNet'>
            >>> innerloop.get("malm")
            Traceback (most recent call last):
            innerloop.registry.UnknownNameError: no algorithm is called 'malm'. Did you mean 'maml' ...
        """
        if not isinstance(name, str):
            return self._check_class(name, "name")
        if name in self._registered:
            return self._registered[name]
        distribution, _, short_name = name.rpartition(":")
        matches = [
            plugin
            for plugin in self.plugins()
            if plugin.name == short_name and (not distribution or plugin.distribution == distribution)
        ]
        if not matches:
            known = self.available()
            if distribution:
                known = [f"{plugin.distribution}:{plugin.name}" for plugin in self.plugins()]
            raise UnknownNameError(f"no {self.kind} is called {name!r}.{nearest(name, known)}")
        if len(matches) > 1:
            choices = " or ".join(f"'{plugin.distribution}:{plugin.name}'" for plugin in matches)
            owners = " and ".join(f"{plugin.distribution} {plugin.version}" for plugin in matches)
            raise PluginError(f"{self.kind} {short_name!r} is offered by {owners}; say which: {choices}")
        return self.load(matches[0])

    def load(self, plugin: Plugin) -> type[Base]:
        """Import one plug-in.

        Raises:
            PluginError: it fails to import, or is not a class of this group's kind.
        """
        try:
            cls = plugin.entry_point.load()
        except Exception as error:
            raise PluginError(f"{self.kind} {plugin} cannot be loaded: {type(error).__name__}: {error}") from error
        try:
            return self._check_class(cls, plugin.entry_point.value)
        except TypeError as error:
            raise PluginError(f"{self.kind} {plugin} cannot be used: {error}") from error

    def listing(self) -> list[tuple[Plugin, str, str]]:
        """(plug-in, one line of what it is, state) of every plug-in; loads each, a broken one only shows its state."""
        rows = []
        names = [plugin.name for plugin in self.plugins()]
        for plugin in self.plugins():
            try:
                summary = summary_of(self.load(plugin))
                clash = names.count(plugin.name) > 1
                state = f"name clash: use {plugin.distribution}:{plugin.name}" if clash else "ok"
            except PluginError as error:
                cause = error.__cause__
                summary = ""
                if isinstance(cause, ModuleNotFoundError):
                    state = f"missing dependency: {cause.name}"
                else:
                    state = f"broken: {cause}"
            rows.append((plugin, summary, state))
        return rows

    def _check_class(self, cls: Any, where: str) -> type[Base]:
        base = self._base()
        if not (inspect.isclass(cls) and issubclass(cls, base)):
            raise TypeError(f"{where} is {cls!r}, expected a subclass of {base.__module__}.{base.__qualname__}")
        return cls


def summary_of(cls: type) -> str:
    """The first line of a class's docstring."""
    return (inspect.getdoc(cls) or "").strip().partition("\n")[0]


def _algorithm_base() -> type[Any]:
    from innerloop.contract import Algorithm

    return Algorithm


def _dataset_base() -> type[Any]:
    from innerloop.contract import Dataset

    return Dataset


algorithms: Registry[Any] = Registry("innerloop.algorithms", "algorithm", _algorithm_base)
datasets: Registry[Any] = Registry("innerloop.datasets", "data set", _dataset_base)
