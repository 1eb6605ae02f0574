"""Writes the pages and pictures of docs/ from benchmarks/results/: of the MAML step and of the heads, a page for each
machine; --readme prints the README's table instead."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import time_to_accuracy_report
from head_workloads import HEAD_WORKLOADS, HeadWorkload
from innerloop.bench.rivals import OURS
from innerloop.bench.table import COLUMNS, cells, counts, number
from maml_pictures import MEMORY, README, RIVAL_BARS, STEPS, TASKS, file_of, pictures
from pictures import Picture, write
from results_files import HEAD_PAGES, JAX, OP, OURSELVES, PAGES, RESULTS, Page, Rows, fastest, measured
from rivals import ALL_RIVALS, RIVALS
from tables import table, told
from workloads import WORKLOADS

#: What a row says in a table; of a rival that has none, None.
Cell = Callable[[dict[str, Any] | None], str]

DOCS = Path(__file__).parents[1] / "docs"


def main() -> None:
    if sys.argv[1:] == ["--readme"]:
        print("\n".join(readme_table(PAGES[0].read())))
        return
    for name, text in documents():
        (DOCS / name).write_text(text)
    for name, picture in all_pictures():
        write(picture, DOCS / name)


def all_pictures() -> Iterator[tuple[str, Picture]]:
    """(file in docs/, picture) of every page."""
    yield time_to_accuracy_report.PICTURE, time_to_accuracy_report.picture(_time_to_accuracy())
    for page in PAGES:
        for name, picture in pictures(page.read()):
            if name != README or page is PAGES[0]:
                yield file_of(page, name), picture


def documents() -> Iterator[tuple[str, str]]:
    """(name, text) of every page of docs/ that is made from results."""
    for pages, lines_of in ((PAGES, document), (HEAD_PAGES, heads_document)):
        for page in pages:
            yield page.document, "\n".join(lines_of(page, page.read())) + "\n"
    yield time_to_accuracy_report.DOCUMENT, "\n".join(time_to_accuracy_report.document(_time_to_accuracy())) + "\n"


def _time_to_accuracy() -> dict[str, Any]:
    return json.loads((RESULTS / time_to_accuracy_report.RESULTS).read_text())


def document(page: Page, results: dict[str, Any]) -> Iterator[str]:
    yield f"# Benchmarks: the MAML step on {page.machine}"
    yield ""
    yield f"<!-- Written by benchmarks/report.py from benchmarks/results/{page.results}: change those, not this. -->"
    yield ""
    yield from _INTRODUCTION.format(**results["machine"]).splitlines()
    yield ""
    yield from others(page, PAGES)
    shown = {name: f"![{_ALT[name]}]({file_of(page, name)})" for name, _ in pictures(results)}
    yield from section("Against everything else", overview(results), _OVERVIEW)
    yield from section("Where innerloop is not ahead", losses(results))
    yield from section("Every rival", every_rival(results, shown[RIVAL_BARS]), _EVERY_RIVAL)
    yield from section("More and fewer tasks", by_size(results, "tasks", shown.get(TASKS)), _BY_TASKS)
    yield from section("More inner steps", by_size(results, "steps", shown.get(STEPS)), _BY_STEPS)
    yield from section("Memory over inner steps", memory(results, shown.get(MEMORY)), _MEMORY)
    yield from section("Two threads", two_threads(results), _TWO_THREADS)
    yield from section("ResNet-12", resnet(results), _RESNET)


def others(page: Page, pages: Iterable[Page]) -> Iterator[str]:
    return (f"The same on {other.machine}: [{other.document}]({other.document})." for other in pages if other != page)


def section(title: str, body: Iterable[str], text: str = "") -> Iterator[str]:
    lines = list(body)
    if not lines:
        lines, text = ["Not measured on this machine."], ""
    yield from ("", f"## {title}", "")
    if text:
        yield from (*text.splitlines(), "")
    yield from lines


_INTRODUCTION = """\
The meta-loss of a batch of tasks and its exact gradient, computed by innerloop and by everything else that was found to
compute it. To repeat it (`peers.sh` makes an environment for each library, on the same torch and numpy):

    ./dev setup && benchmarks/peers.sh
    .venv/bin/python benchmarks/maml.py && .venv/bin/python benchmarks/report.py

The same on your machine, with what torch alone has, for these workloads or a net of your own ([bench.md](bench.md)):

    innerloop bench
    innerloop bench --net conv4 --input-shape 3,84,84 --tasks 4 --shots 5 --inner-steps 5

Machine: {cores} cores of an {processor}, {instruction_set}; one core reaches {fma_gflops:.0f} GFLOP/s in fused \
multiply-adds,
{sgemm_gflops:.0f} in torch.mm at 1024³, and copies at {copy_gigabytes:.0f} GB/s.
Python {python}, torch {torch}, innerloop {innerloop}.

float32, one thread, CPU time, medians; the rivals take turns, and ratios are taken within a round. Before anything is
timed, every rival's gradient is compared with the torch engine's in float64 on two of the tasks; **one that differs is
marked, and its time does not count**. A step is loss and gradients, with the data ready and without the outer
optimizer. "Whole step" is `maml_loss(...)` and `.backward()`, "the op" the native call inside it."""

_OVERVIEW = """\
×: the rival's time over innerloop's whole step. GFLOP: what the products and convolutions that the recurrence needs
come to (a multiply-add counts two). Of mm, of peak: that over the op's time, as a share of what one core reaches in
torch.mm and in multiply-adds alone; above 100% is the saving of Winograd's algorithm and of low-rank updates."""

_EVERY_RIVAL = """\
Wall: the median by wall clock, longer than the CPU time where other processes had the core; – where it was not
recorded. First call: wall clock of the first step, compilation included. Memory: growth during it. Error: of the
gradient in float64."""

_BY_TASKS = "Milliseconds of a step; × as above."

_BY_STEPS = "Milliseconds of a step; × as above. With BatchNorm, vmap's is the one written out."

_MEMORY = """\
Megabytes that a process grew by during its first step, on one thread: what the gradient of K inner steps keeps, and
what a library sets up once. The native engine keeps the parameters and the support pass of every step, of one task a
thread; learn2learn's loop keeps the graph of one task, the torch engine and vmap those of all tasks."""

_ALT = {
    README: "Milliseconds of a step: innerloop, learn2learn, and the fastest of torch's kind and of JAX",
    RIVAL_BARS: "Milliseconds of a step, a panel for each workload and a bar for each rival whose gradient is right",
    TASKS: "Milliseconds of a step over the number of tasks",
    STEPS: "Milliseconds of a step over the number of inner steps",
    MEMORY: "Megabytes over the number of inner steps",
}

_TWO_THREADS = """\
Wall clock, one thread and two in turns; ratio: two threads' time over one's. Floor: half the time of two processes at
once, of one thread each, over that of one alone, which is what the machine's two cores are worth; – where it was not
measured. Memory: growth with two threads. [What keeps small nets from the floor](speed.md#two-threads)."""

_RESNET = "MetaOptNet's ResNet-12, 5-way 5-shot with one query a class, against the torch engine."


# --- heads --------------------------------------------------------------------------------------


def heads_document(page: Page, results: dict[str, Any]) -> Iterator[str]:
    yield f"# Benchmarks: few-shot heads on {page.machine}"
    yield ""
    yield f"<!-- Written by benchmarks/report.py from benchmarks/results/{page.results}: change those, not this. -->"
    yield ""
    yield from _HEADS.format(**results["machine"]).splitlines()
    yield ""
    yield from others(page, HEAD_PAGES)
    yield from section("Where innerloop is not ahead", heads_lost(results))
    for workload, run in measured_heads(results):
        yield from ("", f"## {head_name(workload)}", "")
        yield from table(
            ["", *COLUMNS[:3], "GFLOP/s", *COLUMNS[3:]],
            (head_row(rival, row, run["flops"]) for rival, row in run["rows"].items()),
        )
        yield from ("", told([run]))


_HEADS = """\
A Prototypical Network's loss on given embeddings: class means of the support set, squared Euclidean distances of the
queries to them, cross-entropy, averaged over the tasks; and its gradient for all embeddings. To repeat it:

    ./dev setup && benchmarks/peers.sh
    .venv/bin/python benchmarks/heads.py && .venv/bin/python benchmarks/report.py

Machine: {cores} cores of an {processor}, {instruction_set}; one core reaches {fma_gflops:.0f} GFLOP/s in fused \
multiply-adds,
{sgemm_gflops:.0f} in torch.mm at 1024³, and copies at {copy_gigabytes:.0f} GB/s.
Python {python}, torch {torch}, innerloop {innerloop}.

float32, one thread, CPU time, medians; the rivals take turns, and ×, the rival's time over innerloop's, is taken within
a round. Before anything is timed, loss and gradients are compared with the plain differences' in float64 on two of the
tasks; **one that differs is marked, and its time does not count**. GFLOP/s: of the three products that queries and
prototypes come to at least. torch's expanded forms and JAX's are ‖q‖² − 2 q·c + ‖c‖²; without ‖q‖², which a softmax
does not see, they give the same loss but no distances, and neither is exact where points nearly coincide. innerloop
takes the expanded form too, and sums differences where it would lose digits. easyfsl ships the distance itself: here
it is squared. learn2learn and torchmeta make the [T, Q, N, D] tensor; easyfsl and learn2learn take one task at a
time.

Below are the closed-form heads ([closed-form-heads.md](closed-form-heads.md)) in the place of the distances: ridge
regression, whose system innerloop solves in float64 and torch in the embeddings' dtype, and MetaOptNet's SVM, compared
with a dense interior-point method in plain torch. Their GFLOP/s are of the products with the embeddings."""


def measured_heads(results: dict[str, Any]) -> Iterator[tuple[HeadWorkload, dict[str, Any]]]:
    for name, workload in HEAD_WORKLOADS.items():
        if name in results["races"]:
            run, checks = results["races"][name], results["checks"].get(name, {})
            yield workload, {**run, "rows": {key: {**checks.get(key, {}), **row} for key, row in run["rows"].items()}}


def head_name(workload: HeadWorkload) -> str:
    head = {"prototypes": "Prototypes", "ridge": "Ridge regression", "svm": "The SVM"}[workload.kind]
    return f"{head}: {workload.title}"


def heads_lost(results: dict[str, Any]) -> Iterator[str]:
    found = False
    for workload, run in measured_heads(results):
        for rival, row in run["rows"].items():
            if counts(row) and "ratio" in row and row["ratio"]["median"] <= 1:
                found = True
                yield f"- {head_name(workload)}: {ALL_RIVALS[rival].title}, ×{row['ratio']['median']:.2f}"
    if not found:
        yield "In no row below."


def head_row(rival: str, row: dict[str, Any], flops: int) -> list[str]:
    time, wall, ratio, *others = cells(row)
    rate = f"{flops / row['milliseconds']['median'] * 1e-6:.1f}" if "milliseconds" in row else ""
    return [title(rival, row), time, wall, ratio, rate, *others]


# --- tables -------------------------------------------------------------------------------------


def overview(results: dict[str, Any]) -> Iterator[str]:
    def rows() -> Iterator[list[str]]:
        for workload, run in measured(results, "rivals"):
            by_rival = run["rows"]
            others = [name for name in RIVALS if name not in (*OURSELVES, *JAX)]
            yield [
                workload.heading,
                milliseconds(by_rival.get(OP)),
                milliseconds(by_rival.get(OURS)),
                compared(by_rival, others),
                compared(by_rival, JAX, named=False),
                gigaflops(run),
                share_of(run, results["machine"]["sgemm_gflops"]),
                share_of(run, results["machine"]["fma_gflops"]),
            ]

    return table(
        [
            "T, support + query, K",
            "the op, ms",
            "whole step, ms",
            "fastest of torch's, ms",
            "JAX jit, ms",
            "GFLOP",
            "of mm",
            "of peak",
        ],
        rows(),
    )


def readme_table(results: dict[str, Any]) -> Iterator[str]:
    def rows() -> Iterator[list[str]]:
        for workload, run in measured(results, "rivals"):
            by_rival = run["rows"]
            yield [
                workload.heading,
                milliseconds(by_rival.get(OURS)),
                compared(by_rival, ["learn2learn"], named=False),
                compared(by_rival, [name for name in RIVALS if name not in OURSELVES]),
            ]

    return table(["", "innerloop, ms", "learn2learn, ms", "fastest of the others, ms"], rows())


def losses(results: dict[str, Any]) -> Iterator[str]:
    """Every time that is not above innerloop's."""
    found = False
    for workload, run in measured(results):
        for rival, row in run["rows"].items():
            ratio = row.get("ratio", {}).get("median")
            if counts(row) and rival not in (OURS, OP) and ratio is not None and ratio <= 1:
                found = True
                yield f"- {workload.heading}: {RIVALS[rival].title}, ×{ratio:.2f}"
    if not found:
        yield "In no row below."


def every_rival(results: dict[str, Any], picture: str) -> Iterator[str]:
    yield from (picture, "")
    for workload, run in measured(results, "rivals"):
        yield from (f"### {workload.heading}", "")
        yield from table(
            ["", *COLUMNS],
            ([title(rival, row), *cells(row)] for rival, row in run["rows"].items()),
        )
        yield from ("", told([run]))
        added = [rival for rival, row in run["rows"].items() if "run" in row]
        if added:
            names = ", ".join(RIVALS[rival].title for rival in added)
            yield f"<br>{names}: beside innerloop alone, {told(run['rows'][rival]['run'] for rival in added)}"
        yield ""


def by_size(results: dict[str, Any], group: str, picture: str | None) -> Iterator[str]:
    """A table of times for each net, over T or over K."""
    return _over(results, group, picture, time_and_ratio)


def memory(results: dict[str, Any], picture: str | None) -> Iterator[str]:
    return _over(results, "steps", picture, megabytes)


def _over(results: dict[str, Any], group: str, picture: str | None, cell: Cell) -> Iterator[str]:
    if picture is not None:
        yield from (picture, "")
    for net in dict.fromkeys(workload.title for workload, _ in measured(results, group)):
        runs = [(workload, run) for workload, run in measured(results, group) if workload.title == net]
        first, _ = runs[0]
        rivals = list(dict.fromkeys(rival for _, run in runs for rival, row in run["rows"].items() if counts(row)))
        size, same = ("T", f"K = {first.steps}") if group == "tasks" else ("K", f"T = {first.tasks}")
        yield from (f"### {net}, {first.support} + {first.query}, {same}", "")
        yield from table(
            [size, *(RIVALS[rival].title for rival in rivals)],
            (
                [
                    str(workload.tasks if group == "tasks" else workload.steps),
                    *(cell(run["rows"].get(rival)) for rival in rivals),
                ]
                for workload, run in runs
            ),
        )
        added = [row["run"] for _, run in runs for row in run["rows"].values() if "run" in row]
        yield from ("", told([*(run for _, run in runs), *added]), "")


def two_threads(results: dict[str, Any]) -> Iterator[str]:
    def rows() -> Iterator[list[str]]:
        for name, run in results["threads"].items():
            for rival, row in run["rows"].items():
                head = [WORKLOADS[name].heading, RIVALS[rival].title]
                if "failed" in row:
                    yield [*head, row["failed"], "", "", "", ""]
                    continue
                one, two, ratio = row["one"]["median"], row["milliseconds"]["median"], row["ratio"]
                share = f"{ratio['median']:.2f} ({ratio['min']:.2f}–{ratio['max']:.2f})"
                floor = f"{row['floor']['median']:.2f}" if "floor" in row else "–"
                yield [*head, number(one), number(two), share, floor, number(row["peak_megabytes"])]

    return table(["", "", "one, ms", "two, ms", "ratio", "floor", "memory, MB"], rows())


def resnet(results: dict[str, Any]) -> Iterator[str]:
    return table(
        ["", "", *COLUMNS],
        (
            [workload.heading, title(rival, row), *cells(row)]
            for workload, run in measured(results, "torch")
            for rival, row in run["rows"].items()
        ),
    )


# --- cells --------------------------------------------------------------------------------------


def title(rival: str, row: dict[str, Any]) -> str:
    version = row.get("version", "").partition("+")[0]
    of_torch = ALL_RIVALS[rival].distribution in ("torch", "innerloop")
    return ALL_RIVALS[rival].title + ("" if of_torch or not version else f" {version}")


def milliseconds(row: dict[str, Any] | None) -> str:
    return number(row["milliseconds"]["median"]) if row and "milliseconds" in row else "–"


def time_and_ratio(row: dict[str, Any] | None) -> str:
    if row is None or "milliseconds" not in row:
        return "–"
    return milliseconds(row) + (f" (×{row['ratio']['median']:.1f})" if "ratio" in row else "")


def megabytes(row: dict[str, Any] | None) -> str:
    return number(row["peak_megabytes"]) if row and "peak_megabytes" in row else "–"


def compared(rows: Rows, rivals: Iterable[str], named: bool = True) -> str:
    """The fastest of some rivals: its time, the ratio to ours, and its name."""
    best = fastest(rows, rivals)
    if best is None:
        return "–"
    return time_and_ratio(rows[best]) + (f" {RIVALS[best].title}" if named else "")


def gigaflops(run: dict[str, Any]) -> str:
    return "–" if run["flops"] is None else number(1e-9 * run["flops"])


def share_of(run: dict[str, Any], gflops: float) -> str:
    """The op's rate of a GFLOP/s."""
    row = run["rows"].get(OP, {})
    if run["flops"] is None or "milliseconds" not in row:
        return "–"
    return f"{run['flops'] / row['milliseconds']['median'] * 1e-6 / gflops:.0%}"


if __name__ == "__main__":
    main()
