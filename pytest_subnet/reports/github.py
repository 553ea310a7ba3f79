"""What GitHub Actions shows: the summary of a step, and annotations of what failed."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from pytest_subnet.reports.markdown import page_lines
from pytest_subnet.text import plural, safe

if TYPE_CHECKING:
    from collections.abc import Sequence

    import pytest

    from pytest_subnet.reports.run import Run, Test

MOST_BYTES = 1_000_000
"""Of the summary of a step, with what other commands wrote: beyond 1 MiB all of it is dropped."""
_MOST_ANNOTATIONS = 10
"""Of errors in a step: GitHub shows no more."""
_LONGEST = 4_000
_FENCE = re.compile(r"(`{3,})\w*")


def append_summary(run: Run) -> list[str]:
    """Append `run` to the summary of this step, as far as it fits.

    Returns:
        What went wrong, in a sentence for the terminal; nothing where nothing did.
    """
    name = os.environ.get("GITHUB_STEP_SUMMARY")
    if not name:
        return []
    path = Path(name)
    try:
        there = path.stat().st_size if path.exists() else 0
        with open(path, "a", encoding="utf-8", newline="\n") as file:
            file.write(fitted(page_lines(run), MOST_BYTES - there))
    except OSError as error:
        return [f"subnet: no step summary: {safe(error)}"]
    return []


def fitted(lines: Sequence[str], most: int) -> str:
    r"""As many of `lines` as `most` bytes hold; the last one then counts the others.

    >>> fitted(["| a |", "| b |", "| c |"], 1000)
    '| a |\n| b |\n| c |\n'
    >>> fitted(["| a |"] * 100, 40)
    '| a |\n| a |\n\n98 more rows in the log\n'
    """
    whole = "".join(f"{line}\n" for line in lines)
    if len(whole.encode()) <= most:
        return whole
    kept: list[str] = []
    fence = ""
    size = len(f"\n\n{len(lines):,} more rows in the log\n")
    for line in lines:
        opened = _FENCE.fullmatch(line)
        after = fence
        if opened and not fence:
            after = opened[1]
        elif line == fence:
            after = ""
        size += len(line.encode()) + 1
        if size + len(after) > most:
            break
        kept.append(line)
        fence = after
    if not kept:
        return ""
    closing = [fence] if fence else []
    left = plural(len(lines) - len(kept), "more row")
    return "\n".join([*kept, *closing, "", f"{left} in the log\n"])


def write_annotations(reporter: pytest.TerminalReporter, run: Run, root: Path) -> None:
    """Write a line for each gate that failed, which GitHub shows at its place in the code."""
    for line in error_annotations(run, _in_workspace(root)):
        reporter.write_line(line)


def error_annotations(run: Run, start: str = "") -> list[str]:
    """One `::error` a failed gate, ten at most, of which the last one then counts the others.

    Args:
        run: of which the gates are taken.
        start: what stands before the path of a file: where the rootdir is in the repository.
    """
    failed = [
        test for test in run["tests"] if test["gate"] and test["outcome"] in ("failed", "error")
    ]
    if len(failed) <= _MOST_ANNOTATIONS:
        return [_annotation(test, start) for test in failed]
    shown = [_annotation(test, start) for test in failed[: _MOST_ANNOTATIONS - 1]]
    left = plural(len(failed) - len(shown), "more gate")
    return [*shown, f"::error title=pytest-subnet::{left} failed; the log and the summary have all"]


def _annotation(test: Test, start: str) -> str:
    message = test["message"]
    if len(message) > _LONGEST:
        message = f"{message[:_LONGEST]}\n…"
    file = _property(f"{start}{test['file']}")
    return (
        f"::error file={file},line={test['line']},title={_property(test['nodeid'])}"
        f"::{_data(message or test['outcome'])}"
    )


def _data(text: str) -> str:
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(text: str) -> str:
    return _data(text).replace(":", "%3A").replace(",", "%2C")


def _in_workspace(root: Path) -> str:
    workspace = os.environ.get("GITHUB_WORKSPACE")
    if not workspace or not root.is_relative_to(workspace):
        return ""
    inside = root.relative_to(workspace).as_posix()
    return "" if inside == "." else f"{inside}/"
