"""Bad arguments for every op, public and native, and for the decoder of Programs: each call must return, or be refused
by a Python exception that names an argument.

    python -m reliability.inputs --cases N [--first-batch I]

hypothesis draws the calls (reliability.changes), in batches: batch i is the same whatever ran before it. What fails is
made as small as it can be. Counted are calls that differ. A line of output is the JSON of a batch.

Native code runs in the process: what it must not do ends the process, above all under the sanitizers
(tests/sanitized_python.sh). The file of --progress then holds the batch and the call, and run() goes on with the next.
"""

from __future__ import annotations

import argparse
import faulthandler
import itertools
import json
import logging
import os
import re
import resource
import subprocess
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, Verbosity, given, seed, settings
from hypothesis.errors import Flaky
from torch import Tensor

from reliability import changes, sound_calls
from reliability.changes import Case
from reliability.sound_calls import Call

ROOT = Path(__file__).parents[2]
BATCH = 1000
MOST_CRASHES = 20
PROGRESS = 4000  # bytes

#: A refusal is one of these.
REFUSALS = (TypeError, ValueError, RuntimeError, IndexError, OverflowError, MemoryError)
#: What torch says before the op is asked, or while the op asks for memory: of a tensor too large for memory, of a
#: device, layout or dtype that has no kernel.
BY_TORCH = re.compile(
    r"alloc|memory|overflow|too large|exceed|Could not run|not implemented for|[Ss]parse|"
    r"aten::(contiguous|new_empty|empty|new_zeros)|"
    r"Not yet supported ScalarType|cannot be represented as a SymInt|no tensor arguments"
)
#: A value that does not fit is named with its task.
OF_A_TASK = re.compile(r"\btask \d+")


@dataclass
class Found:
    """Calls that returned and that were refused, by op, no call twice; what was wrong with refusals."""

    returned: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)

    @property
    def by_op(self) -> Counter[str]:
        return self.returned + self.refused

    def add(self, other: Found) -> None:
        self.returned.update(other.returned)
        self.refused.update(other.refused)
        self.failures += other.failures

    def __str__(self) -> str:
        counts = self.by_op
        return (
            f"{counts.total():,} calls of {len(counts)} ops, {min(counts.values(), default=0):,} or more of each: "
            f"{self.refused.total():,} refused, {self.returned.total():,} returned"
        )


class Wrong(Exception):
    """A call was refused as none should be."""


def batches(
    calls: Mapping[str, list[Call]], cases: int, first: int = 0, note: Callable[[str], object] = lambda text: None
) -> Iterator[Found]:
    """Until there were as many calls or more. note: is told what is about to be called."""
    known: set[str] = set()  # failures, each of which is looked for once
    seen: set[int] = set()
    for number in itertools.count(first):
        if len(seen) >= cases:
            break
        yield batch(calls, number, known, seen, note)


def batch(
    calls: Mapping[str, list[Call]],
    number: int,
    known: set[str],
    seen: set[int],
    note: Callable[[str], object],
) -> Found:
    found = Found()
    last = kind = ""

    @seed(number)
    @settings(
        **{"max_examples": BATCH, "phases": (Phase.generate, Phase.shrink), "verbosity": Verbosity.quiet},
        **{"database": None, "deadline": None, "suppress_health_check": list(HealthCheck)},
    )
    @given(changes.cases(calls))
    def attempt(case: Case) -> None:
        nonlocal last, kind
        arguments = case.arguments()
        text = repr(case)
        note(f"batch {number}: {text}")
        problem = outcome(case.call, arguments)
        if hash(text) not in seen:
            seen.add(hash(text))
            (found.returned if problem is None else found.refused)[case.call.name] += 1
        if problem and (which := re.sub(r"-?\d+", "N", f"{case.call.name}: {problem}")) not in known:
            last, kind = f"{text}: {problem}", which
            raise Wrong

    try:
        attempt()
    except (Wrong, Flaky):  # having tried the smallest last
        known.add(kind)
        found.failures.append(last)
    return found


def outcome(call: Call, arguments: Mapping[str, Any]) -> str | None:
    """None: the call returned; "": it was refused as it should be; else what is wrong with the refusal."""
    faulthandler.dump_traceback_later(60, exit=True)  # a call without end
    try:
        with torch.set_grad_enabled(call.name.startswith("maml_loss")):
            call.function(**arguments)
    except REFUSALS as error:
        message = str(error)
        named = call.names().search(message) or OF_A_TASK.search(message)
        if named or isinstance(error, MemoryError) or BY_TORCH.search(message) or on_meta(arguments):
            return ""
        return f"{type(error).__name__} names no argument: {message[:300]}"
    except Exception as error:
        return f"raised {type(error).__name__}: {str(error)[:300]}"
    finally:
        faulthandler.cancel_dump_traceback_later()
    return None


def on_meta(value: Any) -> bool:
    """Whether there is a tensor without memory, for which an op's fake stands, which checks nothing."""
    if isinstance(value, Mapping):
        return any(map(on_meta, value.values()))
    if isinstance(value, (list, tuple)):
        return any(map(on_meta, value))
    return isinstance(value, Tensor) and value.is_meta


def run(python: list[str], cases: int) -> Found:
    """The batches in a process of its own, and in another one if that ends before its time.

    Args:
        python: a command that runs main()."""
    total = Found()
    crashes = first = 0
    with tempfile.TemporaryFile() as progress:
        while (left := cases - total.by_op.total()) > 0 and crashes < MOST_CRASHES:
            os.ftruncate(progress.fileno(), 0)
            arguments = ["--cases", left, "--first-batch", first, "--progress", progress.fileno()]
            done = subprocess.run(
                [*python, *map(str, arguments)],
                env={
                    **os.environ,
                    "PYTHONPATH": str(ROOT / "tests"),
                    "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
                    "ASAN_OPTIONS": "allocator_may_return_null=1:max_allocation_size_mb=512",
                },
                cwd=ROOT,
                pass_fds=[progress.fileno()],
                capture_output=True,
                text=True,
            )
            results = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
            for result in results:
                total.add(Found(Counter(result.pop("returned")), Counter(result.pop("refused")), **result))
            first += len(results) + 1
            if done.returncode != 0:
                crashes += 1
                tried = os.pread(progress.fileno(), PROGRESS, 0).decode().strip() or "before the first call"
                total.failures.append(f"{tried}: the process ended with {done.returncode}: {_reason(done.stderr)}")
    return total


def _reason(output: str) -> str:
    """What a sanitizer or the interpreter said last."""
    lines = [line for line in output.splitlines() if re.search(r"ERROR|error:|Error|Timeout|SUMMARY", line)]
    return " / ".join((lines or output.splitlines())[-3:])[:500]


def main(calls: Mapping[str, list[Call]] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Bad arguments for every op.")
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--first-batch", type=int, default=0)
    parser.add_argument("--progress", type=int, help="file descriptor that the running call is written to")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    if "libasan" not in os.environ.get("LD_PRELOAD", ""):  # AddressSanitizer has a limit of its own
        resource.setrlimit(resource.RLIMIT_AS, (6 << 30, 6 << 30))

    def note(text: str) -> None:
        if given.progress is not None:
            os.pwrite(given.progress, text.encode()[:PROGRESS].ljust(PROGRESS), 0)

    for found in batches(calls or sound_calls.by_op(), given.cases, given.first_batch, note):
        print(json.dumps(vars(found)), flush=True)


if __name__ == "__main__":
    main()
