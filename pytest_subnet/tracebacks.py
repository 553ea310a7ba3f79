"""Tracebacks that end at the user's own line."""

from __future__ import annotations

import contextlib
import linecache
import os
from pathlib import Path
from typing import TYPE_CHECKING

from pytest_subnet.errors import SubnetError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import TracebackType

_HERE = str(Path(__file__).parent) + os.sep
_BETWEEN = (contextlib.__file__, "<string>")
"""What stands between a user's `with` and a context manager; the `__init__` of a dataclass."""


def end_at_caller(error: BaseException) -> None:
    """Cut this package's frames off an error that is meant for the user; its text says enough.

    Such are a `SubnetError`, behind which a library's error is cut off too, and an argument that
    this package refused. An error that nobody meant to raise keeps all its frames.
    """
    entries = list(_entries(error))
    if not entries:
        return
    if isinstance(error, SubnetError):
        error.__cause__ = None
    elif not isinstance(error, TypeError | ValueError) or not _was_raised_here(entries):
        return
    callers = [entry for entry in entries if not _is_own(entry)]
    if callers:
        callers[-1].tb_next = None


def _entries(error: BaseException) -> Iterator[TracebackType]:
    entry = error.__traceback__
    while entry is not None:
        yield entry
        entry = entry.tb_next


def _file(entry: TracebackType) -> str:
    return entry.tb_frame.f_code.co_filename


def _is_own(entry: TracebackType) -> bool:
    return _file(entry).startswith(_HERE) or _file(entry) in _BETWEEN


def _was_raised_here(entries: list[TracebackType]) -> bool:
    last = entries[-1]
    line = linecache.getline(_file(last), last.tb_lineno)
    return _file(last).startswith(_HERE) and line.lstrip().startswith("raise ")
