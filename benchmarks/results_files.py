"""What benchmarks/results/ holds of the MAML step and of the heads, and the pages of docs/ that are made from it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from innerloop.bench.rivals import OURS
from innerloop.bench.table import counts
from innerloop.bench.workloads import Workload
from workloads import WORKLOADS

RESULTS = Path(__file__).parent / "results"

Rows = dict[str, dict[str, Any]]


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


def fastest(rows: Rows, rivals: Iterable[str]) -> str | None:
    """Of some rivals; None where none has a time of the right gradient."""
    valid = [rival for rival in rivals if rival in rows and counts(rows[rival])]
    return min(valid, key=lambda rival: rows[rival]["milliseconds"]["median"], default=None)
