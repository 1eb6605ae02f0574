"""Which of the MAML step's results its page and the README show as pictures."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from innerloop.bench.rivals import OURS
from innerloop.bench.table import counts, number
from innerloop.bench.workloads import Workload
from pictures import Bar, Bars, Line, Lines, Picture
from results_files import JAX, OURSELVES, Page, Rows, fastest, measured
from rivals import RIVALS

#: The README's, and those of a machine's page in this order.
README, RIVAL_BARS, TASKS, STEPS, MEMORY = "step", "rivals", "tasks", "inner-steps", "memory"


def file_of(page: Page, picture: str) -> str:
    """In docs/."""
    return f"images/{page.document.removesuffix('.md')}-{picture}.svg"


def pictures(results: dict[str, Any]) -> Iterator[tuple[str, Picture]]:
    """By name, those for which there are results."""
    runs = list(measured(results, "rivals"))
    yield README, Bars({_title(workload): list(_few(run["rows"])) for workload, run in runs}, "ms a step")
    yield (
        RIVAL_BARS,
        Bars({_title(workload): list(_all(run["rows"])) for workload, run in runs}, "ms a step", columns=2),
    )
    for name, group, x, y, value in (
        (TASKS, "tasks", "tasks T", "ms a step", _milliseconds),
        (STEPS, "steps", "inner steps K", "ms a step", _milliseconds),
        (MEMORY, "steps", "inner steps K", "MB", _megabytes),
    ):
        panels = _panels(list(measured(results, group)), value)
        if panels:
            yield name, Lines(panels, x, y)


def _title(workload: Workload) -> str:
    """In two lines."""
    return f"{workload.title}\n{workload.heading.removeprefix(workload.title).lstrip(',: ')}"


def _milliseconds(row: dict[str, Any]) -> float:
    return row["milliseconds"]["median"]


def _megabytes(row: dict[str, Any]) -> float:
    return row["peak_megabytes"]


def _few(rows: Rows) -> Iterator[Bar]:
    """innerloop, learn2learn, and the fastest of torch's kind and of JAX."""
    of_torch = [name for name in RIVALS if name not in (*OURSELVES, *JAX, "learn2learn")]
    for rival in (OURS, "learn2learn", fastest(rows, of_torch), fastest(rows, JAX)):
        if rival is not None and counts(rows.get(rival, {})):
            yield _bar(rows, rival, RIVALS[rival].title.partition(",")[0])


def _all(rows: Rows) -> Iterator[Bar]:
    return (_bar(rows, rival, RIVALS[rival].title) for rival in rows if counts(rows[rival]))


def _bar(rows: Rows, rival: str, label: str) -> Bar:
    row = rows[rival]
    ratio = f"  ×{row['ratio']['median']:.1f}" if "ratio" in row else ""
    return Bar(rival, label, _milliseconds(row), number(_milliseconds(row)) + ratio)


def _panels(
    runs: Iterable[tuple[Workload, dict[str, Any]]], value: Callable[[dict[str, Any]], float]
) -> dict[str, list[Line]]:
    """Net → the lines of its rivals; a wrong gradient has none."""
    panels: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for workload, run in runs:
        x = workload.tasks if workload.group == "tasks" else workload.steps
        lines = panels.setdefault(_fixed(workload), {})
        for rival, row in run["rows"].items():
            if counts(row):
                lines.setdefault(rival, []).append((x, value(row)))
    return {
        title: [Line(rival, RIVALS[rival].title, points) for rival, points in lines.items()]
        for title, lines in panels.items()
    }


def _fixed(workload: Workload) -> str:
    """The title, and the size that is the same all along."""
    samples = f"{workload.support}+{workload.query}"
    same = f"K={workload.steps}" if workload.group == "tasks" else f"T={workload.tasks}"
    return f"{workload.title}: {samples}, {same}"
