"""The options of a plug-in: its constructor's annotated keyword arguments, read for the command line."""

from __future__ import annotations

import inspect
import re
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from innerloop.registry import nearest

#: Arguments that no command line gives: what every plug-in is handed, and facts of the training data that a constructor
#: may ask for by these names (see Algorithm).
_HANDED_OVER = ("model", "input_shape", "outputs", "training_classes")

_SIMPLE = (bool, int, float, str, Path)
_TRUE, _FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0")


class OptionError(ValueError):
    """An option that does not exist, or a value that it does not take."""


@dataclass(frozen=True)
class Option:
    """One keyword argument that can be written on a command line.

    Attributes:
        name: as in Python. kind: bool, int, float, str, Path, a Literal, or tuple for comma-separated numbers.
        default: its value where it is not given. required: it has none. help: from the docstring's Args section.
    """

    name: str
    kind: Any
    default: Any
    required: bool
    help: str

    def parse(self, text: str) -> Any:
        """The value that a text stands for.

        Raises:
            OptionError: the text is no value of this option.
        """
        if text.lower() == "none" and self.default is None:
            return None
        if get_origin(self.kind) is Literal:
            choices = {str(choice): choice for choice in get_args(self.kind)}
            if text in choices:
                return choices[text]
            raise OptionError(f"{self.name} is {text!r}.{nearest(text, list(choices))}")
        try:
            if self.kind is bool:
                return _TRUE.index(text.lower()) >= 0 if text.lower() not in _FALSE else False
            if self.kind is tuple:
                return parse_numbers(text)
            return self.kind(text)
        except ValueError:
            expected = "comma-separated numbers" if self.kind is tuple else self.kind.__name__
            raise OptionError(f"{self.name} is {text!r}, expected {expected}") from None


def parse_numbers(text: str) -> tuple[float, ...]:
    """Comma-separated numbers."""
    return tuple(float(part) for part in text.split(","))


def options_of(function: Callable[..., Any]) -> list[Option]:
    """The options of a class (its constructor's) or of a function, in order.

    Arguments without an annotation that a command line can express are left out, and so is what a plug-in is handed: an
    algorithm's model, what the data says (input_shape, training_classes), a model's input_shape and outputs.
    """
    signature = inspect.signature(function)
    owner = function.__init__ if inspect.isclass(function) else function
    hints = typing.get_type_hints(owner)
    names = [name for name in signature.parameters if name not in _HANDED_OVER]
    texts: dict[str, str] = {}
    for documented in _documented_by(function):
        texts = _argument_texts(inspect.getdoc(documented) or "", names) | texts
    options = []
    for name in names:
        parameter = signature.parameters[name]
        kind = _command_line_kind(hints.get(name, Any))
        if kind is not None and parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            required = parameter.default is parameter.empty
            default = None if required else parameter.default
            options.append(Option(name, kind, default, required, texts.get(name, "")))
    return options


def _documented_by(function: Callable[..., Any]) -> Sequence[Callable[..., Any]]:
    """Whose docstrings may describe the arguments: of a class that inherits its constructor, also those above it."""
    if not inspect.isclass(function):
        return [function]
    owner = next(cls for cls in function.__mro__ if "__init__" in vars(cls))
    return function.__mro__[: function.__mro__.index(owner) + 1]


def parse_pairs(pairs: Sequence[str], options: Sequence[Option], what: str) -> dict[str, Any]:
    """The values of KEY=VALUE words.

    Raises:
        OptionError: a word is no pair, a key no option (the nearest is named), or a required option is missing.
    """
    known = {option.name: option for option in options}
    values: dict[str, Any] = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        key = key.strip().replace("-", "_")
        if not equals:
            raise OptionError(f"{pair!r} is no option of {what}, expected KEY=VALUE")
        if key not in known:
            raise OptionError(f"{what} has no option {key!r}.{nearest(key, list(known))}")
        values[key] = known[key].parse(text)
    missing = [option.name for option in options if option.required and option.name not in values]
    if missing:
        raise OptionError(f"{what} needs {missing[0]}=VALUE: {known[missing[0]].help}")
    return values


def json_values(values: Mapping[str, Any]) -> dict[str, Any]:
    """Option values as JSON keeps them."""
    return {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}


def _command_line_kind(annotation: Any) -> Any:
    """What a command line parses for an annotation; of a union, its first member that can be written. None: nothing."""
    origin = get_origin(annotation)
    if origin in (typing.Union, types.UnionType):
        kinds = [_command_line_kind(member) for member in get_args(annotation)]
        return next((kind for kind in kinds if kind is not None), None)
    if origin is Literal or annotation in _SIMPLE:
        return annotation
    is_numbers = (
        inspect.isclass(origin) and issubclass(origin, Sequence) and set(get_args(annotation)) <= {int, float, ...}
    )
    return tuple if is_numbers else None


def _argument_texts(doc: str, names: Sequence[str]) -> dict[str, str]:
    """The texts of the Args section, by argument name."""
    section = re.search(r"^Args:\n((?:[ \t]+.*\n?|\n)+)", doc, re.MULTILINE)
    if section is None or not names:
        return {}
    text = " ".join(section.group(1).split())
    parts = re.split(r"(?:^|(?<=[.:] ))(" + "|".join(map(re.escape, [*names, *_HANDED_OVER])) + r"): ", text)
    return {name: body.strip() for name, body in zip(parts[1::2], parts[2::2], strict=True)}
