"""docs/time-to-accuracy.md and its picture from results/time-to-accuracy.json; report.py writes them."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from typing import Any

from innerloop.bench.table import number
from pictures import Line, Lines, Picture
from tables import table, told

RESULTS = "time-to-accuracy.json"
DOCUMENT, PICTURE = "time-to-accuracy.md", "images/time-to-accuracy.svg"
TITLES = {"innerloop": "innerloop", "learn2learn": "learn2learn", "torch": "plain torch"}
#: Whose colour a method has in pictures.
COLOURS = {"innerloop": "innerloop", "learn2learn": "learn2learn", "torch": "loop"}

Points = list[tuple[int, float, float, float]]


def document(results: dict[str, Any]) -> Iterator[str]:
    machine = results["machine"]
    yield "# Benchmarks: time to a test accuracy"
    yield ""
    yield f"<!-- Written by benchmarks/report.py from benchmarks/results/{RESULTS}: change those, not this. -->"
    yield ""
    yield from _INTRODUCTION.format(**machine).splitlines()
    yield ""
    yield f"![Test accuracy over seconds of training, a line for each seed]({PICTURE})"
    for job in results["jobs"].values():
        yield from ("", f"## {job['title']}: {job['goal']:g} %", "")
        rows = [_row(method, job) for method in TITLES]
        yield from table(["", "steps", "wall, s", "CPU, s", "CPU × innerloop's", "last test, %"], rows)
        yield from ("", told(job["seeds"].values()))


_INTRODUCTION = """\
The same model, from the same initial parameters, trained on the same tasks of the built-in letters with the same
optimizer by innerloop, by learn2learn and by a loop in plain torch, until the accuracy on 300 tasks of scripts never
trained on reaches a goal. The three differ in who computes loss and gradient, so that their accuracies are the same up
to rounding, which grows with the steps. They take turns, a period of steps each; the clocks run while tasks are drawn
and steps are made, not during the tests in between. To repeat it:

    ./dev setup && benchmarks/peers.sh learn2learn
    .cache/peers/learn2learn/bin/python benchmarks/time_to_accuracy.py && .venv/bin/python benchmarks/report.py

Machine: {cores} cores of an {processor}, {instruction_set}. Python {python}, torch {torch}, innerloop {innerloop}.

In the tables medians over the seeds, with the least and the most; a time is that of the first test at or above the
goal. In the picture a line for each seed. MAML's step is where the engines differ ([benchmarks.md](benchmarks.md)). A
Prototypical Network's time is that of its backbone, which torch computes in all three; only distances and loss are
native ([heads.md](heads.md)), and no gain is seen."""


def picture(results: dict[str, Any]) -> Picture:
    panels, goals = {}, {}
    for job in results["jobs"].values():
        title = job["title"].partition(",")[0]
        goals[title] = job["goal"]
        panels[title] = [
            Line(
                COLOURS[method],
                TITLES[method] if seed == 0 else "",
                [(wall, accuracy) for _, wall, _, accuracy in points],
            )
            for method in TITLES
            for seed, points in enumerate(run["points"][method] for run in job["seeds"].values())
        ]
    return Lines(panels, "seconds of training, wall clock", "test accuracy, %", sizes=False, goals=goals)


def _row(method: str, job: dict[str, Any]) -> list[str]:
    runs: list[Points] = [run["points"][method] for run in job["seeds"].values()]
    ours: list[Points] = [run["points"]["innerloop"] for run in job["seeds"].values()]
    ratios = [points[-1][2] / other[-1][2] for points, other in zip(runs, ours, strict=True)]
    reached = sum(points[-1][3] >= job["goal"] for points in runs)
    columns = [_spread([points[-1][place] for points in runs]) for place in range(3)]
    last = _spread([points[-1][3] for points in runs]) + ("" if reached == len(runs) else f"; {reached} reached it")
    return [TITLES[method], *columns, "" if method == "innerloop" else _spread(ratios), last]


def _spread(values: list[float]) -> str:
    return f"{number(statistics.median(values))} ({number(min(values))}–{number(max(values))})"
