"""Pictures of results as SVG: bars of rivals, and lines over a size.

A picture is a dataclass of what it shows. Its digest is written into the file, so that a test can tell whether a
committed picture shows the committed results, whatever matplotlib drew it.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

#: By a rival's name, or the part of it before the first hyphen.
COLOURS = {
    "innerloop": "#1b6ca8",
    "innerloop-op": "#6fa8d3",
    "innerloop-torch": "#a9c4d8",
    "loop": "#8c8c8c",
    "vmap": "#c9a227",
    "compile": "#8f6b00",
    "learn2learn": "#c44e52",
    "compat": "#e3a0a2",
    "higher": "#8172b2",
    "torchopt": "#64b5cd",
    "torchmeta": "#55a868",
    "parallel": "#b39ddb",
    "jax-vmap": "#3a3a3a",
    "jax-map": "#b08968",
    "jax-loop": "#7f4f24",
}

STYLE = {
    "font.size": 8,
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "innerloop",  # the same picture is the same file
    "axes.spines.top": False,
    "axes.spines.right": False,
}


@dataclass(frozen=True)
class Bar:
    """One rival's: its name, what stands before the bar, its length, and what stands behind it."""

    rival: str
    label: str
    value: float
    note: str


@dataclass(frozen=True)
class Bars:
    """A panel of horizontal bars for each title, every panel with a scale of its own that begins at 0."""

    panels: Mapping[str, Sequence[Bar]]
    axis: str
    columns: int = 3

    def draw(self, figure: Figure) -> None:
        counts = [len(bars) for bars in self.panels.values()]
        starts = range(0, len(counts), self.columns)
        most = [max(counts[start : start + self.columns]) for start in starts]
        figure.set_size_inches(10, sum(0.17 * count + 0.6 for count in most))
        grid = figure.add_gridspec(len(most), self.columns, height_ratios=most)
        for place, (title, bars) in enumerate(self.panels.items()):
            row, column = divmod(place, self.columns)
            axes: Axes = figure.add_subplot(grid[row, column])
            axes.set_title(title, fontsize=7, loc="left")
            longest = max(bar.value for bar in bars)
            for height, bar in enumerate(bars):
                axes.barh(height, bar.value, height=0.8, color=_colour(bar.rival))
                axes.text(bar.value + 0.02 * longest, height, bar.note, va="center", fontsize=7)
            axes.set_yticks(range(len(bars)), [bar.label for bar in bars])
            axes.set_ylim(most[row] - 0.4, -0.6)
            axes.set_xlim(0, 1.45 * longest)
            axes.tick_params(axis="y", length=0)
            axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(3))
            if place >= len(self.panels) - self.columns:
                axes.set_xlabel(self.axis)


@dataclass(frozen=True)
class Line:
    """One rival's: its name, the label ("" if another line has it), and points (x, y)."""

    rival: str
    label: str
    points: Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Lines:
    """A panel for each title; sizes as x have both axes logarithmic and a mark at each. goals: a height for a panel."""

    panels: Mapping[str, Sequence[Line]]
    x: str
    y: str
    sizes: bool = True
    goals: Mapping[str, float] | None = None

    def draw(self, figure: Figure) -> None:
        figure.set_size_inches(4.4 * len(self.panels), 3.2)
        for place, (title, lines) in enumerate(self.panels.items()):
            axes: Axes = figure.add_subplot(1, len(self.panels), place + 1)
            axes.set_title(title, fontsize=8, loc="left")
            for line in lines:
                x, y = zip(*line.points, strict=True)
                mark = {"marker": "o", "markersize": 3} if self.sizes else {"linewidth": 1.0}
                axes.plot(x, y, color=_colour(line.rival), label=line.label or None, **mark)
            if self.sizes:
                axes.set_xscale("log")
                axes.set_yscale("log")
                places = sorted({x for line in lines for x, _ in line.points})
                axes.set_xticks(places, [f"{x:g}" for x in places])
                axes.xaxis.set_minor_locator(matplotlib.ticker.NullLocator())
            if self.goals is not None:
                axes.axhline(self.goals[title], color="#8c8c8c", linewidth=0.8, linestyle="--")
            axes.set_xlabel(self.x)
            axes.set_ylabel(self.y)
            axes.grid(alpha=0.25)
            axes.legend(fontsize=7, frameon=False)


Picture = Bars | Lines


def digest(picture: Picture) -> str:
    """Of all that the picture shows."""
    shown = json.dumps([type(picture).__name__, asdict(picture)], sort_keys=True)
    return hashlib.sha256(shown.encode()).hexdigest()


def write(picture: Picture, path: Path) -> None:
    with matplotlib.rc_context(STYLE):
        figure = Figure(layout="constrained")
        picture.draw(figure)
        figure.savefig(path, format="svg", metadata={"Date": None, "Description": digest(picture)})


def digest_in(path: Path) -> str | None:
    found = re.search(r"<dc:description>(\w+)</dc:description>", path.read_text())
    return found and found[1]


def _colour(rival: str) -> str:
    return COLOURS[rival if rival in COLOURS else rival.partition("-")[0]]
