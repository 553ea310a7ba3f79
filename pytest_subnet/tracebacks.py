"""Tracebacks that end at the user's own line."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

_HERE = str(Path(__file__).parent)
ErrorT = TypeVar("ErrorT", bound=BaseException)


def end_at_caller(error: ErrorT) -> ErrorT:
    """Cut this package's frames off the end of the error's traceback; its text says enough."""
    last = None
    entry = error.__traceback__
    while entry is not None:
        if not entry.tb_frame.f_code.co_filename.startswith(_HERE):
            last = entry
        entry = entry.tb_next
    if last is not None:
        last.tb_next = None
    return error
