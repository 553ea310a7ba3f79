"""Settings of the process that several threads need otherwise at once."""

import warnings
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest

from pytest_subnet.held import without_warnings


def test_the_last_thread_out_gives_the_filters_back():
    before = list(warnings.filters)
    both_within, one_left = Barrier(2, timeout=60), Barrier(2, timeout=60)

    def leave_first():
        with without_warnings():
            both_within.wait()
        one_left.wait()

    def leave_last():
        with without_warnings():
            both_within.wait()
            one_left.wait()
            warnings.warn("not heard", UserWarning, stacklevel=1)

    with ThreadPoolExecutor(2) as threads:
        first, last = threads.submit(leave_first), threads.submit(leave_last)
        first.result()
        last.result()
    assert list(warnings.filters) == before
    with pytest.warns(UserWarning, match="heard"):
        warnings.warn("heard", UserWarning, stacklevel=1)


def test_an_error_within_gives_them_back():
    before = list(warnings.filters)
    with pytest.raises(ZeroDivisionError), without_warnings():
        _ = 1 / 0
    assert list(warnings.filters) == before
