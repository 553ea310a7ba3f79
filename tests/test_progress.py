"""Progress bars: for a person at a terminal, and only for what takes its time."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
import tqdm

from pytest_subnet import progress

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


END = "<end>"


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], str]]:
    """A terminal that bars are drawn on; gives what was written to it."""
    pty = pytest.importorskip("pty", reason="the system has no pseudo-terminals")
    monkeypatch.delenv("CI", raising=False)
    reading, writing = pty.openpty()

    def written() -> str:
        stream.write(END)
        stream.flush()
        data = b""
        while not data.endswith(END.encode()):  # it comes in pieces
            data += os.read(reading, 1 << 16)
        return data.decode().removesuffix(END)

    with open(writing, "w", encoding="utf-8") as stream, progress.shown_on(stream):
        yield written
    os.close(reading)


@pytest.fixture
def no_delay(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw at once, and at every step."""
    original = tqdm.tqdm.__init__

    def at_once(self: object, *args: object, **options: object) -> None:
        assert options["delay"] == 1
        original(self, *args, **{**options, "delay": 0, "mininterval": 0})

    monkeypatch.setattr(tqdm.tqdm, "__init__", at_once)


def count_to_the_end() -> None:
    with progress.bar(4_000_000, "comparing") as advance:
        for _ in range(4):
            advance(1_000_000)


@pytest.mark.usefixtures("no_delay")
def test_on_a_terminal_a_bar_shows_what_is_done_and_goes_away(
    terminal: Callable[[], str],
) -> None:
    count_to_the_end()
    drawn = terminal()
    assert "comparing:   0%" in drawn
    assert "1.00M/4.00M" in drawn
    assert drawn.endswith("\r")


def test_what_takes_less_than_a_second_draws_nothing(terminal: Callable[[], str]) -> None:
    count_to_the_end()
    assert terminal() == ""


@pytest.mark.usefixtures("no_delay")
def test_in_ci_nothing_is_drawn_even_on_a_terminal(
    terminal: Callable[[], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CI", "true")
    count_to_the_end()
    assert terminal() == ""


@pytest.mark.usefixtures("no_delay")
def test_where_nobody_watches_nothing_is_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CI", raising=False)
    log = io.StringIO()
    with progress.shown_on(log):
        count_to_the_end()
    assert log.getvalue() == ""


def test_standard_error_is_where_bars_go_by_default(
    monkeypatch: pytest.MonkeyPatch, terminal: Callable[[], str]
) -> None:
    shown = progress._stream.get()
    asked = []
    monkeypatch.setattr(shown, "isatty", lambda: asked.append("given") or False, raising=False)
    monkeypatch.setattr(
        sys.stderr, "isatty", lambda: asked.append("stderr") or False, raising=False
    )
    count_to_the_end()
    with progress.shown_on(None):
        count_to_the_end()
    assert asked == ["given", "stderr"]


@pytest.mark.usefixtures("no_delay")
def test_an_error_inside_takes_the_bar_away(terminal: Callable[[], str]) -> None:
    def fail() -> None:
        with progress.bar(10, "comparing") as advance:
            advance(5)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert terminal().endswith("\r")


def test_tqdm_is_not_imported_where_nothing_is_drawn() -> None:
    script = (
        "import sys; from pytest_subnet import progress\n"
        "with progress.bar(10, 'comparing') as advance: advance(10)\n"
        "print('tqdm' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert (done.stdout, done.stderr) == ("False\n", "")


def test_a_line_is_written_where_bars_are_drawn(
    terminal: Callable[[], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    progress.say("ranking, 155 matrices: about 4 min")
    monkeypatch.setenv("CI", "true")
    progress.say("in CI")
    monkeypatch.delenv("CI")
    with progress.shown_on(io.StringIO()):
        progress.say("to nobody")
    assert terminal() == "ranking, 155 matrices: about 4 min\r\n"
