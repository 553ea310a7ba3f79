"""Standard output, which can close or be full at any time."""

from __future__ import annotations

import os
import sys


class OutputError(Exception):
    """The output could not be written; the text says why."""


class ReaderLeftError(OutputError):
    """Who was reading the output has gone, and wants no more of it."""


def put(text: str) -> None:
    """Write `text`, and whatever waits to be written, to standard output.

    Raises:
        ReaderLeftError: nobody reads it any more.
        OutputError: it cannot be written.
    """
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except OSError as error:
        _drop_output()
        what = ReaderLeftError if isinstance(error, BrokenPipeError) else OutputError
        raise what(f"cannot write the output: {error.strerror}") from error


def _drop_output() -> None:
    """Have Python's own last flush go nowhere: it would complain once more, and change the code."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)
