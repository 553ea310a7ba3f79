"""Runs to show: plain data, as the controller builds it."""

import random

import pytest
import torch

from pytest_subnet import open_pair, update_sparsity
from pytest_subnet.reports.building import run_of
from pytest_subnet.reports.measured import lines, measured, text
from pytest_subnet.reports.session import SessionReport

_PARTS = (
    *("<script>alert(1)</script>", "<img src=x onerror=alert(1)>", "</pre>", "<!--", "-->"),
    *("\x1b[31m", "\x1b]8;;http://x\x07", "\r", "\n", "\r\n", "\x00", "\x85", "\u2028", "\u202e"),
    *("::error::", "::set-output name=x::y", "##[error]", "::stop-commands::x", "%0A", "%3A"),
    *("|", "||", "`", "```", "~~~", "\\", "\\|", "*x*", "_x_", "__x__", "[a](http://x)", "![a](x)"),
    *('"', "'", "&amp;", "&#60;", "${x}", "{{ x }}", "{% x %}", "$x$", "@someone", "#1", ":smile:"),
    *("http://x.y/z", "www.x.y", "\ud800", "é", "名前", "a" * 400, "| a | b |\n|---|---|", "---"),
)


@pytest.fixture(scope="session")
def hostile_names():
    """200 names of tensors that are markup, commands or escapes to someone."""
    choose = random.Random(0)
    names = [*_PARTS, *(f"model.layers.{number}.{part}" for number, part in enumerate(_PARTS))]
    while len(names) < 200:
        names.append("".join(choose.choices(_PARTS, k=choose.randint(2, 5))))
    assert len(set(names)) == 200
    return names


@pytest.fixture(scope="session")
def hostile_run(hostile_names):
    """A run in which every text is hostile."""
    base = {name: torch.zeros(2) for name in hostile_names}
    pair = open_pair(base, {name: torch.ones(2) for name in hostile_names})
    pair.base.label, pair.tuned.label = hostile_names[-2:]
    pair.notes = tuple(hostile_names)
    result = measured(update_sparsity(pair), with_tensors=True)
    report = SessionReport()
    report.watch(pair)
    tests = [
        {
            "nodeid": text(f"{name}::{name}"),
            "outcome": "failed",
            "seconds": 0.1,
            "message": lines(f"{name}\n{name}"),
            "file": text(name),
            "line": number,
            "gate": True,
            "results": [result] if number == 1 else [],
        }
        for number, name in enumerate(hostile_names, 1)
    ]
    settings = {"base": hostile_names[0], "tuned": hostile_names[1]}
    return run_of(report.tables(), tests=tests, passed=False, settings=settings)


@pytest.fixture
def make_run():
    """Makes a run of tests, given as keywords that differ from those of one that passed."""

    def make_run(*tests, **more):
        passed = {"nodeid": "test_a.py::test_b", "outcome": "passed", "seconds": 0.5, "message": ""}
        where = {"file": "test_a.py", "line": 3, "gate": True, "results": []}
        tests = [{**passed, **where, **test} for test in tests]
        outcomes = {test["outcome"] for test in tests}
        run = run_of([], tests=tests, passed=outcomes == {"passed"}, settings={})
        return {**run, **more}

    return make_run
