"""The end of a run on the terminal: what moved, by layer and by kind."""

from __future__ import annotations

import io
import sys
from collections import defaultdict
from contextlib import nullcontext
from typing import TYPE_CHECKING, NamedTuple, TextIO, TypeVar, cast

from pytest_subnet.tables import bar, table
from pytest_subnet.text import percent, plural

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from contextlib import AbstractContextManager

    import pytest

    from pytest_subnet.reports.session import PairTable, Row

KeyT = TypeVar("KeyT")

_BAR = 20


def write_summary(reporter: pytest.TerminalReporter, tables: Sequence[PairTable]) -> None:
    """Write a section on every pair that was scanned."""
    if not tables:
        return
    reporter.write_sep("=", "subnet: what moved")
    for number, each in enumerate(tables):
        if number:
            reporter.write_line("")
        for line in summary(each, ascii_only=not _draws_blocks()).splitlines():
            reporter.write_line(line)


def summary(pair: PairTable, *, ascii_only: bool = False) -> str:
    """What moved in one pair, by layer with a bar and by kind."""
    rows = list(pair["rows"].values())
    counts = _add(rows)
    dtypes = "+".join(sorted({dtype for _, _, dtype, *_ in rows}))
    numbers = ["entries", "updated", "same bits", "within 1e-05"]
    layers = _groups(rows, key=lambda row: row[0])
    kinds = _groups(rows, key=lambda row: row[1])
    by_layer = [
        {
            "layer": "-" if layer is None else f"{layer}",
            **group.cells(),
            "moved": bar(group.density, width=_BAR, ascii_only=ascii_only),
        }
        for layer, group in sorted(layers.items(), key=lambda item: (item[0] is None, item[0]))
    ]
    by_kind = [{"kind": kind, **group.cells()} for kind, group in sorted(kinds.items())]
    return "\n".join(
        [
            pair["pair"],
            f"{percent(1 - counts.density)} same bits, density {percent(counts.density)} "
            f"({dtypes}, {len(rows):,}/{pair['total']:,} tensors, "
            f"{plural(counts.entries, 'entry')})",
            *(f"note: {note}" for note in pair["notes"]),
            *_from_cache(pair),
            "",
            table(by_layer, right=["layer", *numbers]),
            "",
            table(by_kind, right=numbers),
        ]
    )


def _from_cache(pair: PairTable) -> list[str]:
    """What was known before, or to another worker; nothing to say where all of it was read."""
    if not pair["taken"]:
        return []
    read = plural(pair["read"], "tensor") if pair["read"] else "nothing"
    return [f"scan cache: {read} read, {plural(pair['taken'], 'tensor')} taken from it"]


class _Counts(NamedTuple):
    """What some tensors hold together."""

    entries: int
    changed: int
    beyond: int

    @property
    def density(self) -> float:
        return self.changed / self.entries

    def cells(self) -> dict[str, object]:
        return {
            "entries": f"{self.entries:,}",
            "updated": f"{self.changed:,}",
            "same bits": percent(1 - self.density),
            "within 1e-05": percent(1 - self.beyond / self.entries),
        }


def _add(rows: Iterable[Row]) -> _Counts:
    return _Counts(*(sum(column) for column in zip(*(row[3:] for row in rows), strict=True)))


def _groups(rows: Iterable[Row], key: Callable[[Row], KeyT]) -> dict[KeyT, _Counts]:
    found: dict[KeyT, list[Row]] = defaultdict(list)
    for row in rows:
        found[key(row)].append(row)
    return {name: _add(members) for name, members in found.items()}


def _draws_blocks() -> bool:
    encoding = getattr(sys.__stdout__, "encoding", None) or "utf-8"
    try:
        "█▏".encode(encoding)
    except (UnicodeEncodeError, LookupError):
        return False
    return True


def say(config: pytest.Config, text: str) -> None:
    """Write a line on the terminal while tests run; where there is none, into captured output."""
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    if reporter is None or hasattr(config, "workerinput"):
        print(text)
        return
    with _past_capture(config):
        reporter.ensure_newline()
        reporter.write_line(text)


def _past_capture(config: pytest.Config) -> AbstractContextManager[None]:
    """While tests run, what is written anywhere is captured, the terminal reporter's too."""
    manager = config.pluginmanager.get_plugin("capturemanager")
    if manager is None:
        return nullcontext()
    disabled: AbstractContextManager[None] = manager.global_and_fixture_disabled()
    return disabled


class TerminalStream(io.TextIOBase):
    """The terminal that pytest writes to, past its capture, for progress bars."""

    def __init__(self, config: pytest.Config, reporter: pytest.TerminalReporter) -> None:
        """Write where `reporter` writes."""
        self._config = config
        self._reporter = reporter
        self._started = False

    @classmethod
    def of(cls, config: pytest.Config) -> TextIO | None:
        """The terminal of this process; None where nobody watches."""
        reporter = config.pluginmanager.get_plugin("terminalreporter")
        if reporter is None or hasattr(config, "workerinput") or not reporter.isatty:
            return None
        return cast("TextIO", cls(config, reporter))

    def isatty(self) -> bool:
        """A person is watching: otherwise there is no stream."""
        return True

    def write(self, text: str) -> int:
        """Write `text` as it is; the first time on a line of its own."""
        with _past_capture(self._config):
            if not self._started:
                self._reporter.ensure_newline()
                self._started = True
            # Not through the reporter, which would count a bar's columns as those of its line.
            sys.stdout.write(text)
            sys.stdout.flush()
        return len(text)

    def flush(self) -> None:
        """All is written at once."""
