"""The plug-in rules, on distributions made of nothing but metadata and a module."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import innerloop
from innerloop.registry import PluginError, Registry, UnknownNameError, algorithms

BUILT_INS = {
    "anil", "baseline", "baseline_pp", "boil", "finetune", "fomaml", "maml", "maml_pp", "matching_net", "meta_sgd",
    "metaoptnet", "proto_maml", "protonet", "r2d2", "relation_net", "reptile", "simpleshot",
}  # fmt: skip

GOOD = """
from innerloop import Algorithm
class Good(Algorithm):
    '''A good one.

    More about it.
    '''
    def forward(self, tasks): ...
    def adapt(self, support_x, support_y): ...
"""

Install = Callable[..., None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """install("dist", "name = module:Class", module="source", version="2.0") puts such a distribution on sys.path."""
    monkeypatch.syspath_prepend(tmp_path)

    def write(distribution: str, entry: str, version: str = "1.0", **modules: str) -> None:
        info = tmp_path / f"{distribution}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n")
        (info / "entry_points.txt").write_text(f"[innerloop.algorithms]\n{entry}\n")
        for module, source in modules.items():
            (tmp_path / f"{module}.py").write_text(source)
            monkeypatch.delitem(sys.modules, module, raising=False)

    return write


def row(name: str) -> tuple[str, str, str, str]:
    """(distribution, version, summary, state) that the listing shows for a name."""
    return next(
        (plugin.distribution, plugin.version, summary, state)
        for plugin, summary, state in algorithms.listing()
        if plugin.name == name
    )


def test_the_built_ins_are_found_through_their_entry_points() -> None:
    assert set(innerloop.available()) >= BUILT_INS
    assert innerloop.available() == sorted(innerloop.available())
    assert {plugin.name for plugin in algorithms.plugins() if plugin.is_builtin} >= BUILT_INS
    assert innerloop.get("maml").__module__ == "innerloop.algorithms.maml"


def test_a_third_party_is_found_and_loaded(install: Install) -> None:
    install("good-dist", "good = good_one:Good", version="2.1", good_one=GOOD)
    assert "good" in innerloop.available()
    assert "good_one" not in sys.modules, "discovery must not import"
    assert innerloop.get("good").__name__ == "Good"
    assert innerloop.get("good-dist:good") is innerloop.get("good")
    assert row("good") == ("good-dist", "2.1", "A good one.", "ok")


def test_a_class_passes_through() -> None:
    maml = innerloop.get("maml")
    assert innerloop.get(maml) is maml
    with pytest.raises(TypeError, match=r"expected a subclass of innerloop\.contract\.Algorithm"):
        innerloop.get(dict)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mamll", r"no algorithm is called 'mamll'\. Did you mean 'maml'.*There are: anil, b"),
        ("zzz", r"no algorithm is called 'zzz'\. There are: anil"),
        ("nowhere:maml", r"no algorithm is called 'nowhere:maml'.*innerloop:maml"),
    ],
)
def test_an_unknown_name_raises_with_what_there_is(name: str, message: str) -> None:
    with pytest.raises(UnknownNameError, match=message):
        innerloop.get(name)


@pytest.mark.parametrize(
    ("source", "message", "state"),
    [
        ("raise RuntimeError('boom')", "RuntimeError: boom", "broken: boom"),
        ("import no_such_package", "No module named 'no_such_package'", "missing dependency: no_such_package"),
        ("other = 1", "has no attribute 'Bad'", "broken: module 'bad_one' has no attribute 'Bad'"),
        ("class Bad: ...", "expected a subclass of innerloop.contract.Algorithm", "broken: bad_one:Bad is"),
    ],
)
def test_a_broken_plugin_is_listed_with_its_state_and_breaks_nobody_else(
    install: Install, source: str, message: str, state: str
) -> None:
    install("bad-dist", "bad = bad_one:Bad", version="0.3", bad_one=source)
    assert "bad" in innerloop.available()
    assert row("bad")[:3] == ("bad-dist", "0.3", "")
    assert row("bad")[3].startswith(state)
    assert row("maml")[3] == "ok"
    with pytest.raises(PluginError, match=r"'bad' of bad-dist 0.3") as caught:
        innerloop.get("bad")
    assert message in str(caught.value)
    assert caught.value.__cause__ is not None


def test_two_distributions_with_one_name_must_be_told_apart(install: Install) -> None:
    install("one", "twin = first_twin:Good", first_twin=GOOD)
    install("two", "twin = second_twin:Good", second_twin=GOOD)
    with pytest.raises(PluginError, match=r"one 1\.0 and two 1\.0; say which: 'one:twin' or 'two:twin'"):
        innerloop.get("twin")
    assert innerloop.get("two:twin").__module__ == "second_twin"
    assert row("twin")[3] == "name clash: use one:twin"


def test_a_built_in_is_never_replaced_silently(install: Install) -> None:
    install("impostor", "maml = fake_maml:Good", fake_maml=GOOD)
    with pytest.raises(PluginError, match=r"impostor 1\.0 and innerloop .*'innerloop:maml'"):
        innerloop.get("maml")
    assert innerloop.get("innerloop:maml").__module__ == "innerloop.algorithms.maml"


def test_third_parties_can_be_turned_off(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    install("good-dist", "good = good_one:Good", good_one=GOOD)
    monkeypatch.setenv("INNERLOOP_PLUGINS", "off")
    assert "good" not in innerloop.available()
    assert set(innerloop.available()) >= BUILT_INS
    with pytest.raises(UnknownNameError):
        innerloop.get("good")


def test_a_notebook_registers_a_class() -> None:
    registry = Registry("innerloop.algorithms", "algorithm", lambda: innerloop.Algorithm)
    maml = innerloop.get("maml")
    registry.register("mine", maml)
    registry.register("mine", maml)  # re-running the cell
    assert registry.get("mine") is maml
    assert "mine" in registry.available()
    with pytest.raises(ValueError, match="'maml' belongs to an installed algorithm"):
        registry.register("maml", maml)
    with pytest.raises(ValueError, match="without ':'"):
        registry.register("a:b", maml)
    with pytest.raises(TypeError, match="expected a subclass"):
        registry.register("number", int)  # type: ignore[arg-type]


def test_import_loads_no_algorithm_and_stays_light() -> None:
    script = """
import sys, torch
before = set(sys.modules)
import innerloop
new = set(sys.modules) - before
assert not [name for name in new if name.startswith("innerloop.algorithms")], new
heavy = {"typer", "rich", "matplotlib", "PIL", "safetensors", "torch.fx", "torch._dynamo", "scipy"}
assert not heavy & new, heavy & new
innerloop.available()
assert not [name for name in sys.modules if name.startswith("innerloop.algorithms")]
"""
    subprocess.run([sys.executable, "-c", script], check=True)
