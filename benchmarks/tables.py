"""Tables and notes in Markdown, as the pages of results have them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any


def table(head: list[str], rows: Iterable[list[str]]) -> Iterator[str]:
    """Nothing where there are no rows."""
    rows = list(rows)
    if not rows:
        return
    yield "| " + " | ".join(head) + " |"
    yield "|" + "---|" * len(head)
    for row in rows:
        yield "| " + " | ".join(row) + " |"


def told(runs: Iterable[dict[str, Any]]) -> str:
    """When and how rows were measured, a line for each command."""
    loads: dict[str, list[float]] = {}
    for run in runs:
        first = " at real-time priority" if run.get("real_time") else ""
        loads.setdefault(f"{run['date']}, `{run['command']}`{first}", []).extend([run["load"]] if "load" in run else [])
    return "<br>".join(line + _load(values) for line, values in loads.items())


def _load(values: list[float]) -> str:
    if not values:
        return ""
    low, high = min(values), max(values)
    return f", load average {low}" + (f"–{high}" if high > low else "")
