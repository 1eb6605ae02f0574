"""The directive ``algorithm``: what an algorithm's class says of it, its options, and its measured test accuracy.

    ```{algorithm} maml
    What is read where the page is not built: on GitHub, say.
    ```

Nothing of it is written twice: the words are the class's docstring, the options its constructor's, as the command line
reads them, and the accuracies those of benchmarks/results/accuracy.json, which docs/algorithms.md tables too.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

import innerloop
from innerloop.options import options_of

RESULTS = Path(__file__).parent.parent / "benchmarks" / "results" / "accuracy.json"
SETTINGS = [(5, 1), (5, 5), (20, 1), (20, 5)]
SECTIONS = ("Args:", "Attributes:", "Raises:", "Returns:")


class AlgorithmDirective(SphinxDirective):
    required_arguments = 1
    has_content = True  # and it is left out

    def run(self) -> list[nodes.Node]:
        name = self.arguments[0]
        self.env.note_dependency(str(RESULTS))
        lines = list(page(name, innerloop.get(name), json.loads(RESULTS.read_text())))
        return self.parse_text_to_nodes("\n".join(lines), allow_section_headings=False)


def page(name: str, cls: type, results: dict[str, Any]) -> Iterator[str]:
    """Markdown."""
    yield from description(cls)
    yield from ("", f"By the command line `innerloop train {name}`, in Python `innerloop.get({name!r})`.")
    yield from ("", "**Options**", "")
    rows = [[f"`{option.name}`", value(option.default), option.help or "–"] for option in options_of(cls)]
    yield from table(["option", "default", "what it is"], rows)
    defaults = cls.training_defaults  # type: ignore[attr-defined]
    if defaults:
        settings = ", ".join(f"`{key}={setting}`" for key, setting in defaults.items())
        yield from ("", f"**Training** by `innerloop train {name}` takes, unless told otherwise, {settings}.")
    yield from ("", "**Test accuracy**", "")
    rows = [[title, *accuracies(row), bn_of(row)] for title, row in results["rows"].items() if is_of(title, name)]
    if not rows:
        yield "It is no few-shot classifier, and not in [the table of these](../algorithms.md)."
        return
    yield "On the built-in glyphs, %, scripts never trained on; ± is the 95% interval over 600 tasks of one training."
    yield "Rows of different BatchNorm modes [do not compare](../evaluation-protocol.md). Budget, backbone and commands"
    yield from ("are in [the table of all algorithms](../algorithms.md).", "")
    yield from table(["", *(f"{ways}-way {shots}-shot" for ways, shots in SETTINGS), "BatchNorm"], rows)


def description(cls: type) -> Iterator[str]:
    """The class's docstring but for its sections, as Markdown."""
    text = inspect.getdoc(cls) or ""
    for paragraph in text.split("\n\n"):
        if paragraph.startswith(SECTIONS):
            return
        yield from ("", paragraph.replace("``", "`").replace(":func:", "").replace(":class:", "").replace(":attr:", ""))


def is_of(title: str, name: str) -> bool:
    return title.partition(",")[0] == name


def accuracies(row: dict[str, Any]) -> Iterator[str]:
    by_setting = {(e["ways"], e["shots"]): e for training in row.values() for e in training["evaluations"]}
    for setting in SETTINGS:
        found = by_setting.get(setting)
        yield "–" if found is None else f"{100 * found['mean']:.1f} ± {100 * found['ci95']:.1f}"


def bn_of(row: dict[str, Any]) -> str:
    return ", ".join(sorted({e["bn"] for training in row.values() for e in training["evaluations"]}))


def value(default: Any) -> str:
    return "–" if default is None else f"`{default}`"


def table(head: list[str], rows: list[list[str]]) -> Iterator[str]:
    yield "| " + " | ".join(head) + " |"
    yield "|" + "---|" * len(head)
    for row in rows:
        yield "| " + " | ".join(cell.replace("|", r"\|") for cell in row) + " |"


def setup(app: Sphinx) -> None:
    app.add_directive("algorithm", AlgorithmDirective)
