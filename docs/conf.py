"""How Sphinx makes the documentation: ``./dev docs``."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable
from importlib.metadata import version as version_of
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx

sys.path.insert(0, str(Path(__file__).parent))  # for algorithm_pages

project = "innerloop"
version = release = version_of("innerloop")
extensions = ["algorithm_pages", "myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["wide.css"]
html_title = f"innerloop {version}"
html_show_copyright = False
highlight_language = "text"  # indented blocks are commands and formulas; fenced ones name their language

myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the docstrings say shapes and dtypes, which annotations cannot
napoleon_use_ivar = True
napoleon_attr_annotations = False
napoleon_use_rtype = False

SHAPE = re.compile(r"(?<![`\w\]])\[(?=[A-Z4*.])([^\]`\n]{1,40})\]")


def setup(app: Sphinx) -> None:
    app.connect("source-read", unlink_folders)
    app.connect("autodoc-process-docstring", to_restructured_text, priority=400)  # napoleon's is 500


def unlink_folders(app: Sphinx, name: str, source: list[str]) -> None:
    """Links to folders of the repository are for those who read the pages there: here they are words."""
    page = Path(app.env.doc2path(name)).parent
    source[0] = re.sub(
        r"\[([^\]]+)\]\((\.\.[^)]*)\)", lambda link: link[1] if (page / link[2]).is_dir() else link[0], source[0]
    )


def to_restructured_text(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Docstrings are written to be read in the source; this makes of their short forms what napoleon reads.

    Several arguments of one line get a line each, "Returns: text" is a field, shapes such as [T, S, D] are literal, and
    bars and stars are themselves. Examples stay as they are.
    """
    try:
        names = [*inspect.signature(obj).parameters, *inspect.get_annotations(obj)]
    except (TypeError, ValueError):
        names = []
    text = "\n".join(lines)
    if names:
        section = r"^(?:Args|Attributes):\n(?:[ \t]+.*\n?|\n)+"
        text = re.sub(section, lambda match: _one_a_line(match[0], names), text, flags=re.MULTILINE)
    text = re.sub(r"^Returns: ((?:.+\n?)+)", _returns, text, flags=re.MULTILINE)
    text = re.sub(r"(^|: )(\w\.)$", r"\1\\\2", text, flags=re.MULTILINE)  # "N." begins no list
    text = _outside_literals(text, lambda part: SHAPE.sub(r"``[\1]``", part))
    text = _outside_literals(text, lambda part: re.sub(r"[|*]", r"\\\g<0>", part))
    lines[:] = text.split("\n")


def _outside_literals(text: str, change: Callable[[str], str]) -> str:
    parts = re.split(r"(``.+?``|`[^`\n]+`|^ *>>> (?:.+\n?)+)", text, flags=re.MULTILINE)
    parts[::2] = map(change, parts[::2])
    return "".join(parts)


def _one_a_line(section: str, names: list[str]) -> str:
    indent = re.search(r"\n([ \t]+)", section)
    start = "\n" + (indent[1] if indent else "    ")
    name = f"(?:{'|'.join(map(re.escape, names))})"
    return re.sub(rf"(?<=[.:)\]])(?: |\n[ \t]+)(?={name}(?:, {name})*: )", start, section)


def _returns(match: re.Match[str]) -> str:
    return ":returns: " + match[1].replace("\n", "\n    ").rstrip() + "\n"
