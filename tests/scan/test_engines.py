"""Threads: each unit exactly once, errors come out, and nobody works on after the end."""

from __future__ import annotations

import os
import threading
from collections import Counter
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

from pytest_subnet.scan.engines import ThreadEngine, cores

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


class Doubling:
    """Work that doubles numbers, counts what it did, and can fail."""

    def __init__(self, fails: Callable[[int], BaseException | None] = lambda _: None) -> None:
        self.fails = fails
        self.done: list[int] = []
        self.open_now = 0
        self.threads: set[str] = set()
        self._lock = threading.Lock()

    @contextmanager
    def open(self) -> Iterator[Callable[[int], int]]:
        with self._lock:
            self.open_now += 1
            self.threads.add(threading.current_thread().name)
        try:
            yield self._double
        finally:
            with self._lock:
                self.open_now -= 1

    def _double(self, number: int) -> int:
        error = self.fails(number)
        if error is not None:
            raise error
        with self._lock:
            self.done.append(number)
        return 2 * number


@pytest.mark.parametrize("threads", [1, 2, 7])
@pytest.mark.parametrize("units", [0, 1, 3, 500])
def test_each_unit_comes_back_exactly_once(threads: int, units: int) -> None:
    work = Doubling()
    results = list(ThreadEngine(threads).map(work, range(units)))
    assert sorted(results) == [(n, 2 * n) for n in range(units)]
    assert Counter(work.done) == Counter(range(units))
    assert work.open_now == 0
    assert len(work.threads) <= min(threads, units)


def test_results_are_keyed_by_position() -> None:
    assert sorted(ThreadEngine(2).map(Doubling(), [7, 7, 5])) == [(0, 14), (1, 14), (2, 10)]


def test_one_thread_works_in_order() -> None:
    assert list(ThreadEngine(1).map(Doubling(), [3, 1, 2])) == [(0, 6), (1, 2), (2, 4)]


@pytest.mark.parametrize("error", [OSError("disk"), KeyboardInterrupt(), SystemExit(3)])
def test_the_first_error_of_a_unit_is_raised_and_stops_the_workers(error: BaseException) -> None:
    work = Doubling(fails=lambda number: error if number == 2 else None)
    with pytest.raises(type(error)) as caught:
        list(ThreadEngine(1).map(work, range(1000)))
    assert caught.value is error
    assert work.done == [0, 1]
    assert work.open_now == 0


def test_an_error_stops_the_other_workers_before_all_is_done() -> None:
    failed = threading.Event()

    def fails(number: int) -> BaseException | None:
        if number == 0:
            failed.set()
            return ValueError("broken")
        failed.wait()
        return None

    work = Doubling(fails)
    with pytest.raises(ValueError, match="broken"):
        list(ThreadEngine(2).map(work, range(1_000_000)))
    assert len(work.done) < 1_000_000 - 1
    assert threading.active_count() == active_before(work)


def active_before(work: Doubling) -> int:
    """The threads that are alive, without any of `work`."""
    return sum(thread.name not in work.threads for thread in threading.enumerate())


def test_an_error_while_opening_is_raised() -> None:
    class Broken:
        def open(self) -> object:
            raise PermissionError("no")

    with pytest.raises(PermissionError):
        list(ThreadEngine(2).map(Broken(), [1, 2, 3]))


def test_closing_stops_the_workers() -> None:
    work = Doubling()
    results = ThreadEngine(2).map(work, range(10_000_000))
    next(results)
    results.close()
    assert len(work.done) < 10_000_000
    assert work.open_now == 0
    assert threading.active_count() == active_before(work)


def test_nothing_starts_before_the_first_result_is_asked_for() -> None:
    work = Doubling()
    ThreadEngine(2).map(work, range(10)).close()
    assert (work.done, work.threads) == ([], set())


def test_a_thread_for_each_core_that_may_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 5, 9}, raising=False)
    assert cores() == 3
    assert ThreadEngine().threads == 3
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert cores() == 1
    assert ThreadEngine(5).threads == 5
