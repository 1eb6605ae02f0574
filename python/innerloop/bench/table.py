"""The cells of a table of results, for the command line and for the pages."""

from __future__ import annotations

from typing import Any

#: Of `cells`, which stand beside the rival's name.
COLUMNS = ["ms (least–most)", "wall, ms", "×", "first call, s", "memory, MB", "error"]


def cells(row: dict[str, Any]) -> list[str]:
    """Of one rival's row: CPU time, wall clock, ratio, first call, memory, error; or why it has none, and nothing."""
    if "milliseconds" not in row:
        return [row["failed"], *[""] * (len(COLUMNS) - 1)]
    time = row["milliseconds"]
    return [
        f"{number(time['median'])} ({number(time['min'])}–{number(time['max'])})",
        number(row["wall_milliseconds"]["median"]) if "wall_milliseconds" in row else "–",
        f"{row['ratio']['median']:.2f}" if "ratio" in row else "",
        number(row["first_seconds"]),
        number(row["peak_megabytes"]),
        _error(row),
    ]


def counts(row: dict[str, Any]) -> bool:
    """Whether it has a time, and of the right gradient."""
    return "milliseconds" in row and row.get("exact", False)


def number(value: float) -> str:
    """Three digits."""
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}" if abs(value) >= 1 else f"{value:.3f}"


def _error(row: dict[str, Any]) -> str:
    if "error" not in row:
        return "unchecked"
    return f"{row['error']:.0e}" + ("" if row["exact"] else " **wrong**")
