"""Settings of the whole process, while any of several threads needs them otherwise."""

from __future__ import annotations

import threading
import warnings
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


class Held:
    """A setting that the first thread in changes, and the last one out gives back.

    Threads that would each save and restore it leave behind what another one had set.
    """

    def __init__(self, change: Callable[[], Callable[[], None]]) -> None:
        """Take what changes the setting, and returns what takes that back."""
        self._change = change
        self._lock = threading.Lock()
        self._within = 0
        self._take_back: Callable[[], None] | None = None

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Within, the setting is changed for all threads."""
        with self._lock:
            if not self._within:
                self._take_back = self._change()
            self._within += 1
        try:
            yield
        finally:
            with self._lock:
                self._within -= 1
                if not self._within and self._take_back:
                    self._take_back()


def _ignore() -> Callable[[], None]:
    before = warnings.catch_warnings()
    before.__enter__()
    warnings.simplefilter("ignore")
    return lambda: before.__exit__(None, None, None)


without_warnings = Held(_ignore)
"""Nothing is warned of within: `warnings.catch_warnings` is for a process of one thread."""
