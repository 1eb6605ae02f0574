"""Writes the pages of docs/ from benchmarks/results/: of the MAML step and of the heads, a page for each machine;
--readme prints the README's table instead."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from head_workloads import HEAD_WORKLOADS, HeadWorkload
from innerloop.bench.rivals import OURS
from innerloop.bench.table import COLUMNS, cells, counts, number
from innerloop.bench.workloads import Workload
from rivals import ALL_RIVALS, RIVALS
from workloads import WORKLOADS

HERE = Path(__file__).parent
RESULTS = HERE / "results"
DOCS = HERE.parent / "docs"


@dataclass(frozen=True)
class Page:
    """What was measured on one machine: a file of results/, and the page of docs/ made from it."""

    results: str
    document: str
    machine: str

    def read(self) -> dict[str, Any]:
        return json.loads((RESULTS / self.results).read_text())


PAGES = [
    Page("maml-avx512.json", "benchmarks.md", "a Zen 4 EPYC with AVX-512"),
    Page("maml-avx2.json", "benchmarks-avx2.md", "a Zen 1 EPYC with AVX2"),
]

HEAD_PAGES = [
    Page("heads-avx512.json", "heads.md", PAGES[0].machine),
    Page("heads-avx2.json", "heads-avx2.md", PAGES[1].machine),
]

OP = "innerloop-op"
#: Rivals that are no other library: they are shown, but are not "the best of the others".
OURSELVES = (OURS, OP, "innerloop-torch", "compat")
JAX = ("jax-vmap", "jax-map", "jax-loop")

Rows = dict[str, dict[str, Any]]


def main() -> None:
    if sys.argv[1:] == ["--readme"]:
        print("\n".join(readme_table(PAGES[0].read())))
        return
    for name, text in documents():
        (DOCS / name).write_text(text)


def documents() -> Iterator[tuple[str, str]]:
    """(name, text) of every page of docs/ that is made from results."""
    for pages, write in ((PAGES, document), (HEAD_PAGES, heads_document)):
        for page in pages:
            yield page.document, "\n".join(write(page, page.read())) + "\n"


def document(page: Page, results: dict[str, Any]) -> Iterator[str]:
    yield f"# Benchmarks: the MAML step on {page.machine}"
    yield ""
    yield f"<!-- Written by benchmarks/report.py from benchmarks/results/{page.results}: change those, not this. -->"
    yield ""
    yield from _INTRODUCTION.format(**results["machine"]).splitlines()
    yield ""
    yield from others(page, PAGES)
    yield from section("Against everything else", overview(results), _OVERVIEW)
    yield from section("Where innerloop is not ahead", losses(results))
    yield from section("Every rival", every_rival(results), _EVERY_RIVAL)
    yield from section("More and fewer tasks", by_tasks(results), _BY_TASKS)
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
compute it. To repeat it:

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

_TWO_THREADS = """\
Wall clock, one thread and two in turns; ratio: two threads' time over one's, so that 0.5 is perfect. Memory: growth
with two threads."""

_RESNET = "MetaOptNet's ResNet-12, 5-way 5-shot with 15 queries a class, against the torch engine."


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
        yield from ("", told(run))


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


def table(head: list[str], rows: Iterable[list[str]]) -> Iterator[str]:
    """Nothing where there are no rows."""
    rows = list(rows)
    if not rows:
        return
    yield "| " + " | ".join(head) + " |"
    yield "|" + "---|" * len(head)
    for row in rows:
        yield "| " + " | ".join(row) + " |"


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


def every_rival(results: dict[str, Any]) -> Iterator[str]:
    for workload, run in measured(results, "rivals"):
        yield from (f"### {workload.heading}", "")
        yield from table(
            ["", *COLUMNS],
            ([title(rival, row), *cells(row)] for rival, row in run["rows"].items()),
        )
        yield from ("", told(run))
        for line in dict.fromkeys(told(row["run"]) for row in run["rows"].values() if "run" in row):
            added = ", ".join(RIVALS[rival].title for rival, row in run["rows"].items() if told(row.get("run")) == line)
            yield f"<br>{added}: in a race of their own with innerloop, {line}"
        yield ""


def told(run: dict[str, Any] | None) -> str:
    """When and how rows were measured."""
    if run is None:
        return ""
    load = f", at a load average of {run['load']}" if "load" in run else ""
    return f"{run['date']}, `{run['command']}`{load}"


def by_tasks(results: dict[str, Any]) -> Iterator[str]:
    for net in dict.fromkeys(workload.title for workload, _ in measured(results, "tasks")):
        runs = [(workload, run["rows"]) for workload, run in measured(results, "tasks") if workload.title == net]
        rivals = list(dict.fromkeys(rival for _, rows in runs for rival in rows if "milliseconds" in rows[rival]))
        yield from (f"### {net}, K = {runs[0][0].steps}", "")
        yield from table(
            ["T", *(RIVALS[rival].title for rival in rivals)],
            ([str(workload.tasks), *(time_and_ratio(rows.get(rival)) for rival in rivals)] for workload, rows in runs),
        )
        yield ""


def two_threads(results: dict[str, Any]) -> Iterator[str]:
    def rows() -> Iterator[list[str]]:
        for name, run in results["threads"].items():
            for rival, row in run["rows"].items():
                head = [WORKLOADS[name].heading, RIVALS[rival].title]
                if "failed" in row:
                    yield [*head, row["failed"], "", "", ""]
                    continue
                one, two, ratio = row["one"]["median"], row["milliseconds"]["median"], row["ratio"]
                share = f"{ratio['median']:.2f} ({ratio['min']:.2f}–{ratio['max']:.2f})"
                yield [*head, number(one), number(two), share, number(row["peak_megabytes"])]

    return table(["", "", "one, ms", "two, ms", "ratio", "memory, MB"], rows())


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


def measured(results: dict[str, Any], group: str | None = None) -> Iterator[tuple[Workload, dict[str, Any]]]:
    """In the order of the workloads, not of their measurement."""
    for name, workload in WORKLOADS.items():
        if name in results["races"] and group in (None, workload.group):
            run = results["races"][name]
            checks = results["checks"].get(_checked_as(workload), {})
            rows = {rival: {**checks.get(rival, {}), **row} for rival, row in run["rows"].items()}
            yield workload, {**run, "rows": rows}


def _checked_as(workload: Workload) -> str:
    """Another number of tasks or of steps is the same code: the row with T and K of the paper was checked."""
    if workload.group not in ("tasks", "steps"):
        return workload.name
    return f"{workload.name.rpartition('-')[0]}-k1"


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


def compared(rows: Rows, rivals: Iterable[str], named: bool = True) -> str:
    """The fastest of some rivals: its time, the ratio to ours, and its name."""
    valid = [rival for rival in rivals if rival in rows and counts(rows[rival])]
    if not valid:
        return "–"
    best = min(valid, key=lambda rival: rows[rival]["milliseconds"]["median"])
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
