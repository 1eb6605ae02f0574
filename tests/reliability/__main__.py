"""./dev reliability: tries what must not go wrong, and prints what was tried and what failed.

    ./dev reliability             the short form, minutes
    ./dev reliability --long      the long form, an hour and more; its results go to docs/reliability.json, with
                                  date and machine, and from there into the table of docs/reliability.md
    ./dev reliability NAME...     these checks alone, in either form

The inputs of the long form run under AddressSanitizer and UndefinedBehaviorSanitizer, in a build of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from innerloop.bench import machine
from reliability import checkpoints, inputs, memory, repeats, suite

ROOT = Path(__file__).parents[2]
JSON, PAGE = ROOT / "docs" / "reliability.json", ROOT / "docs" / "reliability.md"
BEGIN, END = "<!-- table: ./dev reliability --long -->", "<!-- end -->"


@dataclass
class Row:
    """A line of the table. failures: what went wrong; skipped: why nothing was tried; details: more to show."""

    what: str
    tried: str
    failures: list[str] = field(default_factory=list)
    skipped: str = ""
    details: list[str] = field(default_factory=list)
    seconds: float = 0.0


def killed(long: bool) -> Row:
    count = 220 if long else 12
    return Row("training killed and gone on with", f"{count} kills", checkpoints.kills(count))


def full_disk(long: bool) -> Row:
    count = 40 if long else 4
    try:
        return Row("training on a full disk", f"{count} full disks", checkpoints.full_disk(count))
    except PermissionError as error:
        return Row("training on a full disk", "–", skipped=str(error))


def damaged(long: bool) -> Row:
    count = 400 if long else 20
    return Row("damaged checkpoints", f"{count} files", checkpoints.damage(count))


def bad_inputs(long: bool) -> Row:
    cases = int(os.environ.get("INNERLOOP_INPUTS", 100_000 if long else 2_000))
    python = str(ROOT / "tests" / "sanitized_python.sh") if long else sys.executable
    found = inputs.run([python, "-m", "reliability.inputs"], cases)
    return Row(f"bad arguments{', under ASan and UBSan' if long else ''}", str(found), found.failures)


def threads(long: bool) -> Row:
    calls = 200 if long else 10
    return Row("8 Python threads at once", f"{8 * calls:,} calls", repeats.python_threads(8, calls))


def determinism(long: bool) -> Row:
    runs, counts = (3, (1, 2, 3)) if long else (2, (1, 2))
    rows, failures = repeats.table(runs, counts)
    head = ["algorithm", "engine", *(f"{runs} runs, {count} thread{'s' * (count > 1)}" for count in counts)]
    head.append(f"{', '.join(map(str, counts))} threads")
    lines = [head, ["---"] * len(head), *([name, engine, *same] for name, engine, same in rows)]
    details = [f"| {' | '.join(line)} |" for line in lines]
    return Row("the same bits again", f"{len(rows)} algorithms and engines × {runs} runs", failures, details=details)


def memory_in_training(long: bool) -> Row:
    steps = 1000 if long else 250
    # A leak grows in both. On a busy machine a thread may take its first task, and its workspace, late in the first.
    growth = min(memory.growth_in_training(steps) for _ in range(2))
    failures = [f"the process grew by {growth:.1f} MB"] if growth > 4 else []
    return Row(
        "memory in training", f"{steps:,} steps, twice: {growth:+.1f} MB or more after the first fifth", failures
    )


def memory_of_tasks(long: bool) -> Row:
    few, many = 4, (512 if long else 64)
    small, large, difference = memory.growth_with_tasks(few, many)
    failures = [f"{many} tasks need {large:.0f} MB, {few} need {small:.0f}"] if large > small + 8 + 0.1 * many else []
    failures += [f"the gradient in parts differs by {difference:.1e}"] if not difference < 1e-12 else []
    tried = f"{few} tasks: {small:.1f} MB, {many}: {large:.1f} MB; gradient in parts of {few}: {difference:.0e} apart"
    return Row("memory of a batch, native engine", tried, failures)


def memory_of_chunks(long: bool) -> Row:
    chunk, many = 4, (256 if long else 32)
    one, chunks, whole = memory.of_chunks(chunk, many)
    failures = [f"{many} tasks in chunks need {chunks:.0f} MB, {chunk} need {one:.0f}"] if chunks > 2 * one + 8 else []
    tried = f"{chunk} tasks: {one:.0f} MB, {many} by task_chunk={chunk}: {chunks:.0f} MB, at once: {whole:.0f} MB"
    return Row("memory of a step, torch engine", tried, failures)


def tests(name: str, long: bool) -> Row:
    outcome = suite.run(suite.TESTS[name], slow=long)
    return Row(suite.TESTS[name].what, str(outcome), outcome.failures)


CHECKS: dict[str, Callable[[bool], Row]] = {
    "kills": killed,
    "disk": full_disk,
    "damage": damaged,
    "inputs": bad_inputs,
    "threads": threads,
    "determinism": determinism,
    "memory": memory_in_training,
    "tasks": memory_of_tasks,
    "chunks": memory_of_chunks,
    **{name: partial(tests, name) for name in suite.TESTS},
}


def table(rows: Iterable[Row]) -> str:
    lines = ["| what | tried | failures |", "|---|---|---|"]
    for row in rows:
        outcome = f"skipped: {row.skipped}" if row.skipped else len(row.failures)
        lines.append(f"| {row.what} | {row.tried} | {outcome} |")
    return "\n".join(lines)


def record(name: str, row: Row) -> None:
    """Put a check's result into the JSON, and the tables of all into the page."""
    known: dict[str, Any] = json.loads(JSON.read_text()) if JSON.exists() else {}
    known[name] = {"date": time.strftime("%Y-%m-%d"), "machine": machine.describe(), **asdict(row)}
    known = {each: known[each] for each in CHECKS if each in known}
    JSON.write_text(json.dumps(known, indent=2, ensure_ascii=False) + "\n")
    rows, places = [], []
    for entry in known.values():
        date, on = entry.pop("date"), entry.pop("machine")
        rows.append(Row(**entry))
        places.append(
            f"Run on {date}, {on['processor']}, {on['cores']} cores ({on['instruction_set']}), torch {on['torch']}, "
            f"Python {on['python']}."
        )
    details = ["\n".join(row.details) for row in rows if row.details]
    text = "\n\n".join([BEGIN, *dict.fromkeys(places), table(rows), *details, END])
    page = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(re.sub(f"{re.escape(BEGIN)}.*{re.escape(END)}", lambda _: text, page, flags=re.DOTALL))


def main() -> None:
    parser = argparse.ArgumentParser(prog="./dev reliability")
    parser.add_argument("checks", nargs="*", choices=[[], *CHECKS], help="all, if none is named")
    parser.add_argument("--long", action="store_true")
    given = parser.parse_args()
    rows = []
    for name in given.checks or CHECKS:
        start = time.perf_counter()
        row = CHECKS[name](given.long)
        row.seconds = round(time.perf_counter() - start, 1)
        rows.append(row)
        outcome = f"skipped: {row.skipped}" if row.skipped else f"{len(row.failures)} failures"
        if given.long:
            record(name, row)
        print(f"{name} ({row.seconds:.0f} s): {row.tried}; {outcome}", file=sys.stderr, flush=True)
        for failure in row.failures[:20]:
            print(f"  {failure}", file=sys.stderr, flush=True)
    print("\n".join([table(rows), *("\n" + "\n".join(row.details) for row in rows if row.details)]))
    sys.exit(any(row.failures for row in rows))


if __name__ == "__main__":
    main()
