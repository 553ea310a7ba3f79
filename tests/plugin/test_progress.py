"""Progress bars: on a person's terminal past pytest's capture, nowhere else."""

import os
import subprocess
import sys

import pytest

pty = pytest.importorskip("pty", reason="this system has no pseudo-terminals")

SLOW = """
    from itertools import count

    from pytest_subnet import progress

    def test_slow(monkeypatch):
        clock = count()  # a second passes at every look at it
        monkeypatch.setattr("tqdm.std.time", lambda: float(next(clock)))
        print("what the test prints")
        with progress.bar(100, "comparing") as advance:
            for _ in range(20):
                advance(5)
        assert __import__("sys").stdout.isatty() is False
"""


def on_a_terminal(project, *arguments, **environment):
    """What a person would see of a run."""
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "pytest", *("-p", "no:hypothesispytest"), *arguments]
    run = subprocess.Popen(
        command,
        cwd=project.path,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env={**os.environ, "COLUMNS": "100", **environment},
    )
    os.close(theirs)
    seen = b""
    try:
        while part := os.read(ours, 4096):
            seen += part
    except OSError:  # how Linux says that the other side has closed
        pass
    os.close(ours)
    assert run.wait() == 0, seen.decode()
    return seen.decode()


@pytest.mark.parametrize("capture", ["fd", "sys"])
def test_a_bar_reaches_the_terminal_past_the_capture(project, capture):
    project.makepyfile(SLOW)

    seen = on_a_terminal(project, f"--capture={capture}")

    assert "comparing:  50%|" in seen
    assert "what the test prints" not in seen
    assert seen.rstrip().splitlines()[-1].count("1 passed") == 1


def test_no_bar_in_ci(project):
    project.makepyfile(SLOW)

    assert "comparing" not in on_a_terminal(project, CI="true")


def test_no_bar_where_nobody_watches(project, run_apart):
    project.makepyfile(SLOW)

    result = run_apart("-rP")

    result.assert_outcomes(passed=1)
    result.stdout.no_fnmatch_line("*comparing*")
    result.stderr.no_fnmatch_line("*comparing*")


def test_no_bar_without_pytests_terminal(project):
    project.makepyfile(SLOW)

    assert "comparing" not in on_a_terminal(project, "-p", "no:terminal")
