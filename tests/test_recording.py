"""Where results go: to whoever listens in this context, else nowhere."""

from __future__ import annotations

import contextvars
import subprocess
import sys
import threading

import pytest
import torch

from pytest_subnet import assert_update_sparsity, open_pair, update_sparsity
from pytest_subnet.recording import record, recording_to


class Result:
    def __init__(self, number: int) -> None:
        self.number = number

    def to_dict(self) -> dict[str, object]:
        return {"finding": "a test", "number": self.number}


def test_results_reach_the_sink_in_order() -> None:
    seen: list[Result] = []
    with recording_to(seen.append):
        record(Result(1))
        record(Result(2))
    assert [result.to_dict()["number"] for result in seen] == [1, 2]


def test_where_nobody_listens_nothing_happens() -> None:
    seen: list[Result] = []
    record(Result(1))
    with recording_to(seen.append):
        pass
    record(Result(2))
    assert seen == []


def test_the_innermost_sink_listens() -> None:
    outer: list[Result] = []
    inner: list[Result] = []
    with recording_to(outer.append):
        with recording_to(inner.append):
            record(Result(1))
        record(Result(2))
    assert ([r.number for r in inner], [r.number for r in outer]) == ([1], [2])


def test_a_sink_is_gone_after_an_exception() -> None:
    seen: list[Result] = []
    with pytest.raises(KeyError), recording_to(seen.append):
        raise KeyError
    record(Result(1))
    assert seen == []


def test_a_thread_listens_only_in_a_copy_of_the_context() -> None:
    seen: list[Result] = []
    with recording_to(seen.append):
        in_context = contextvars.copy_context().run
        for target, arguments in ((record, (Result(1),)), (in_context, (record, Result(2)))):
            thread = threading.Thread(target=target, args=arguments)
            thread.start()
            thread.join()
    assert [result.number for result in seen] == [2]


def test_every_finding_is_recorded_also_one_that_fails() -> None:
    pair = open_pair({"a.weight": torch.zeros(4)}, {"a.weight": torch.ones(4)})
    seen: list[Result] = []
    with recording_to(seen.append):
        update_sparsity(pair)
        with pytest.raises(AssertionError):
            assert_update_sparsity(pair, at_least=0.5)
    assert {result.to_dict()["finding"] for result in seen} == {"update_sparsity"}
    assert len(seen) >= 2


def test_recording_needs_no_pytest() -> None:
    script = "import sys; import pytest_subnet.recording; print('pytest' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout == "False\n"
