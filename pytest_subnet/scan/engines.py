"""Who does the work: threads of this process, or this thread alone; `ray_engine.py` has a third."""

from __future__ import annotations

import os
import queue
import threading
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, TypeVar

from pytest_subnet.arithmetic import count_subnormals

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator, Sequence

    from pytest_subnet.scan.contracts import Work

UnitT = TypeVar("UnitT")
ResultT = TypeVar("ResultT")


def cores() -> int:
    """How many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class ThreadEngine:
    """A thread a core; each draws the next unit when it is done with one.

    Kernels and reads release the interpreter lock, so the threads do run at once.
    """

    def __init__(self, threads: int | None = None) -> None:
        """Use `threads` threads; one a core by default."""
        self.threads = threads or cores()

    def map(
        self, work: Work[UnitT, ResultT], units: Sequence[UnitT]
    ) -> Generator[tuple[int, ResultT]]:
        """As `Engine.map`."""
        done: queue.SimpleQueue[tuple[int, ResultT] | BaseException] = queue.SimpleQueue()
        stop = threading.Event()
        positions = iter(range(len(units)))  # next() on it is atomic

        def run() -> None:
            count_subnormals()
            try:
                with work.open() as compute:
                    for position in positions:
                        if stop.is_set():
                            return
                        done.put((position, compute(units[position])))
            except BaseException as error:  # handed over, and raised by the caller's thread
                done.put(error)

        workers = [
            threading.Thread(target=run, name=f"subnet-{number}", daemon=True)
            for number in range(min(self.threads, len(units)))
        ]
        try:
            for worker in workers:
                worker.start()
            for _ in units:
                outcome = done.get()
                if isinstance(outcome, BaseException):
                    raise outcome
                yield outcome
        finally:
            stop.set()
            for worker in workers:
                worker.join()


class ThisThread:
    """One unit after the other, for work that uses all cores by itself."""

    def map(
        self, work: Work[UnitT, ResultT], units: Sequence[UnitT]
    ) -> Generator[tuple[int, ResultT]]:
        """As `Engine.map`."""
        with work.open() as compute:
            for position, unit in enumerate(units):
                yield position, compute(unit)


@dataclass(frozen=True)
class MadeThere(Generic[UnitT, ResultT]):
    """`Work` for a worker elsewhere: which kernel is fastest is up to the machine it is on.

    Attributes:
        make: a function that can be pickled; makes the work there.
    """

    make: Callable[[], Work[UnitT, ResultT]]

    @contextmanager
    def open(self) -> Iterator[Callable[[UnitT], ResultT]]:
        """As `Work.open`."""
        with self.make().open() as compute:
            yield compute
