"""Memory of this process and of the machine, as Linux counts it."""

from __future__ import annotations

from pathlib import Path


def _kilobytes(file: str, field: str) -> int:
    for line in Path(file).read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1])
    raise LookupError(f"{file} has no {field}")


def available_bytes() -> int:
    """What the machine has left, and this process's data."""
    return 1024 * (_kilobytes("/proc/meminfo", "MemAvailable") + _kilobytes("/proc/self/status", "VmData"))


def resident_megabytes() -> float:
    return _kilobytes("/proc/self/status", "VmRSS") / 2**10


def peak_megabytes() -> float:
    """The largest this process has been since it started or forgot."""
    return _kilobytes("/proc/self/status", "VmHWM") / 2**10


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")
