"""Progress bars: shown on a person's terminal for what takes longer than a second, nowhere else."""

from __future__ import annotations

import os
import sys
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_stream: ContextVar[TextIO | None] = ContextVar("pytest_subnet_progress", default=None)


@contextmanager
def shown_on(stream: TextIO | None) -> Iterator[None]:
    """Draw the bars of this block on `stream`, for a host that captures standard error."""
    token = _stream.set(stream)
    try:
        yield
    finally:
        _stream.reset(token)


@contextmanager
def bar(total: int, what: str, *, unit: str = "B") -> Iterator[Callable[[int], None]]:
    """A bar over `total` bytes, or another unit; gives the function that advances it.

    Nothing is drawn before a second has passed, where the stream is no terminal, or in CI.
    """
    stream = _watched()
    if stream is None:
        yield lambda _: None
        return
    from tqdm import tqdm

    with tqdm(
        total=total, desc=what, unit=unit, unit_scale=True, delay=1, leave=False, file=stream
    ) as shown:
        yield lambda done: (shown.update(done), None)[1]


def say(line: str) -> None:
    """Write a line above the bars, where bars are drawn."""
    stream = _watched()
    if stream is not None:
        from tqdm import tqdm

        tqdm.write(line, file=stream)


def _watched() -> TextIO | None:
    """Where a person looks; None where nobody does."""
    stream = _stream.get() or sys.stderr
    return stream if stream.isatty() and not os.environ.get("CI") else None
