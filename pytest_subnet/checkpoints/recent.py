"""The last few things that were made, so that pieces of one are not made again for each."""

from __future__ import annotations

import threading
from concurrent.futures import Future
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")

_KEPT_BYTES = 256 * 1024 * 1024
"""Threads draw the pieces of a pair in order: 16 threads are within 256 MB of each other."""


class Recent(Generic[T]):
    """Keeps what was made last, 256 MB of it, or the very last thing where that is larger.

    Threads may ask at once: what one of them is making, the others wait for. A copy that is sent
    to another process starts empty.
    """

    def __init__(self) -> None:
        """Keep nothing yet."""
        self._lock = threading.Lock()
        self._kept: dict[str, tuple[int, Future[T]]] = {}

    def get(self, name: str, nbytes: int, make: Callable[[], T]) -> T:
        """What is kept under `name`, or else what `make` gives, which takes `nbytes`."""
        with self._lock:
            known = self._kept.get(name)
            if known is None:
                kept = self._kept[name] = nbytes, Future[T]()
                while len(self._kept) > 1 and sum(each for each, _ in self._kept.values()) > (
                    _KEPT_BYTES
                ):
                    del self._kept[next(iter(self._kept))]
        if known is not None:
            return known[1].result()
        try:
            kept[1].set_result(make())
        except BaseException as error:  # whoever waits for it must not wait for ever
            with self._lock:
                self._kept.pop(name, None)
            kept[1].set_exception(error)
        return kept[1].result()

    def __reduce__(self) -> tuple[type[Recent[T]], tuple[()]]:
        """A new one: locks and what is in memory do not travel."""
        return type(self), ()
