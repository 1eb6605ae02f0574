"""Constructor arguments as command-line options."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import pytest
from torch import Tensor

from innerloop.options import Option, OptionError, json_values, options_of, parse_pairs


class Example:
    """Has every kind of option.

    Args:
        model: always handed over.
        rate: how fast. Ratio 1: 2 is no argument's name.
        steps: how often, in a text
            of two lines.
        kind: "a" or "b". folder: where from.
        weights: of the steps.
    """

    def __init__(
        self,
        model: object,
        rate: float | Tensor | Mapping[str, float] = 0.5,
        steps: int = 2,
        kind: Literal["a", "b"] = "a",
        folder: Path | None = None,
        weights: Sequence[float] | None = None,
        fast: bool = False,
        callback: Callable[[], None] | None = None,
        *arguments: int,
        name: str,
        **more: Any,
    ) -> None: ...


OPTIONS = {option.name: option for option in options_of(Example)}


def test_what_is_an_option() -> None:
    assert {name: (option.kind, option.default, option.required) for name, option in OPTIONS.items()} == {
        "rate": (float, 0.5, False),
        "steps": (int, 2, False),
        "kind": (Literal["a", "b"], "a", False),
        "folder": (Path, None, False),
        "weights": (tuple, None, False),
        "fast": (bool, False, False),
        "name": (str, None, True),
    }


def test_help_is_the_arguments_text() -> None:
    assert {name: option.help for name, option in OPTIONS.items()} == {
        "rate": "how fast. Ratio 1: 2 is no argument's name.",
        "steps": "how often, in a text of two lines.",
        "kind": '"a" or "b".',
        "folder": "where from.",
        "weights": "of the steps.",
        "fast": "",
        "name": "",
    }


def test_an_inherited_constructor_has_the_help_of_above() -> None:
    class Heir(Example):
        """Says more of one argument.

        Args:
            steps: as the heir has it.
        """

    helps = {option.name: option.help for option in options_of(Heir)}
    assert helps == {name: option.help for name, option in OPTIONS.items()} | {"steps": "as the heir has it."}


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("rate", "0.1", 0.1),
        ("steps", "3", 3),
        ("kind", "b", "b"),
        ("folder", "/data/x", Path("/data/x")),
        ("folder", "None", None),
        ("weights", "0,0.5,1", (0.0, 0.5, 1.0)),
        ("weights", "none", None),
        ("fast", "yes", True),
        ("fast", "Off", False),
        ("name", "a=b", "a=b"),
    ],
)
def test_values(name: str, text: str, value: object) -> None:
    parsed = parse_pairs([f"{name}={text}"], [OPTIONS[name]], "x")
    assert parsed == {name: value}
    assert type(parsed[name]) is type(value)


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        ("rate=fast", "rate is 'fast', expected float"),
        ("steps=1.5", "steps is '1.5', expected int"),
        ("steps=None", "steps is 'None', expected int"),
        ("kind=c", "kind is 'c'. There are: a, b."),
        ("weights=1;2", "weights is '1;2', expected comma-separated numbers"),
        ("fast=maybe", "fast is 'maybe', expected bool"),
        ("step=1", "the example has no option 'step'. Did you mean 'steps'"),
        ("steps", "'steps' is no option of the example, expected KEY=VALUE"),
        ("steps=1", "the example needs name=VALUE"),
    ],
)
def test_what_is_refused(pair: str, message: str) -> None:
    with pytest.raises(OptionError) as error:
        parse_pairs([pair], list(OPTIONS.values()), "the example")
    assert message in str(error.value)


def test_dashes_are_underscores() -> None:
    assert parse_pairs(["inner-lr=2"], [Option("inner_lr", float, 1.0, False, "")], "x") == {"inner_lr": 2.0}


def test_json_keeps_paths_as_text() -> None:
    assert json_values({"folder": Path("/a"), "steps": 2}) == {"folder": "/a", "steps": 2}
