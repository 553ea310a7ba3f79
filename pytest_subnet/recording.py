"""Where results go: a sink that the plugin sets around each test.

Without pytest, or outside a test, recording a result does nothing.
"""

from __future__ import annotations

from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping


class Recordable(Protocol):
    """What can be recorded: every result of a finding."""

    def to_dict(self) -> dict[str, object]:
        """The result as plain JSON types, with its finding under `"finding"`."""
        ...


class Traceable(Recordable, Protocol):
    """A result that says which checkpoints it is of, as a baseline needs it."""

    @property
    def fingerprints(self) -> Mapping[str, str]:
        """Of the content of each checkpoint, 32 hexadecimal digits, by what it is in the result.

        Those whose names start with `base` are what was tuned: a number of another base is another
        number. Each may be taken when it is asked for.
        """
        ...


class Sink(Protocol):
    """Takes each result as it is measured or judged."""

    def __call__(self, result: Recordable) -> None:
        """Keep `result`; must not raise."""
        ...


_sink: ContextVar[Sink | None] = ContextVar("pytest_subnet_sink", default=None)


def record(result: Recordable) -> None:
    """Hand `result` to whoever listens in this context, if anyone does.

    A thread that a test starts listens only if it was started in a copy of the test's context.
    """
    sink = _sink.get()
    if sink is not None:
        sink(result)


@contextmanager
def recording_to(sink: Sink) -> Iterator[None]:
    """Send all results recorded inside the block to `sink`.

    >>> class Result:
    ...     def to_dict(self):
    ...         return {"finding": "example"}
    >>> seen = []
    >>> with recording_to(seen.append):
    ...     record(Result())
    >>> seen[0].to_dict()
    {'finding': 'example'}
    """
    token = _sink.set(sink)
    try:
        yield
    finally:
        _sink.reset(token)
