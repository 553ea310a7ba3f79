"""Measuring: processes one after the other, medians of ratios taken in one run."""

from __future__ import annotations

import atexit
import json
import os
import platform
import statistics
import subprocess
import sys
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable


class Run(NamedTuple):
    """What one process cost and said."""

    seconds: float
    cpu_seconds: float
    peak_mb: float
    output: str


# A process starts with the peak memory of the one that starts it, as the kernel accounts it: this
# one stays small, whatever the benchmark itself comes to hold.
STARTER = """
import json, os, subprocess, sys, time
for line in sys.stdin:
    command, environment = json.loads(line)
    start = time.perf_counter()
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    cpu = usage.ru_utime + usage.ru_stime
    print(json.dumps([process.returncode, seconds, cpu, usage.ru_maxrss, output]), flush=True)
"""
_starter = subprocess.Popen(
    [sys.executable, "-S", "-c", STARTER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
)
atexit.register(_starter.kill)


def run(*command: str) -> Run:
    """Run a command to its end; its own peak memory, as the kernel accounted it."""
    assert _starter.stdin is not None
    assert _starter.stdout is not None
    print(json.dumps([command, dict(os.environ)]), file=_starter.stdin, flush=True)
    returncode, seconds, cpu_seconds, peak, output = json.loads(_starter.stdout.readline())
    if returncode != 0:
        raise SystemExit(f"{' '.join(command)} failed with {returncode}:\n{output}")
    scale = 1 if platform.system() == "Darwin" else 1024  # bytes there, kB elsewhere
    return Run(seconds, cpu_seconds, peak * scale / 1e6, output)


def python(code: str, *arguments: object) -> Run:
    """Run a few lines of Python in a fresh interpreter."""
    return run(sys.executable, "-c", code, *map(str, arguments))


def seconds(work: Callable[[], object]) -> float:
    """How long one call takes."""
    start = perf_counter()
    work()
    return perf_counter() - start


def ratios(one: Callable[[], object], other: Callable[[], object], rounds: int) -> list[float]:
    """Time of `one` over time of `other`, measured in turn, sorted."""
    return sorted(seconds(one) / seconds(other) for _ in range(rounds))


def spread(values: list[float], digits: int = 2) -> str:
    """Median, with minimum and maximum."""
    return (
        f"{statistics.median(values):.{digits}f} "
        f"({min(values):.{digits}f} to {max(values):.{digits}f})"
    )


def machine() -> str:
    """The machine in a line."""
    names = [
        line.partition(":")[2].strip()
        for line in _read(Path("/proc/cpuinfo")).splitlines()
        if line.startswith("model name")
    ]
    return (
        f"{names[0] if names else platform.machine()}, {os.cpu_count()} cores, {platform.system()}"
    )


def _read(path: Path) -> str:
    return path.read_text() if path.exists() else ""


def show(rows: list[tuple[str, str, str]]) -> None:
    """Print the table: what, measured, must reach."""
    import importlib.metadata as metadata

    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("numpy", "numba", "torch"))
    print(f"\n{machine()}; Python {platform.python_version()}, {versions}\n")
    print("| what | measured | must reach |\n|---|---|---|")
    for row in rows:
        print(f"| {' | '.join(row)} |")
    print(json.dumps({what: measured for what, measured, _ in rows}), file=sys.stderr)
