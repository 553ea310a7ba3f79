"""The end of a run on the terminal: what moved, by layer and by kind."""

from __future__ import annotations

import io
import sys
from collections import defaultdict
from typing import TYPE_CHECKING

from pytest_subnet.tables import bar, table
from pytest_subnet.text import percent, plural

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    import pytest

    from pytest_subnet.reports.session import PairTable, Row

_BAR = 20


def write_summary(reporter: pytest.TerminalReporter, tables: Sequence[PairTable]) -> None:
    """Write a section on every pair that was scanned."""
    if not tables:
        return
    reporter.section("subnet: what moved")
    for number, each in enumerate(tables):
        if number:
            reporter.write_line("")
        for line in summary(each, ascii_only=not _draws_blocks()).splitlines():
            reporter.write_line(line)


def summary(pair: PairTable, *, ascii_only: bool = False) -> str:
    """What moved in one pair, by layer with a bar and by kind."""
    rows = list(pair["rows"].values())
    entries, changed = sum(row[2] for row in rows), sum(row[3] for row in rows)
    coverage = f"{len(rows):,}/{pair['total']:,} tensors, {plural(entries, 'entry')}"
    numbers = ["entries", "updated", "same bits", "within 1e-05"]
    by_layer = [
        {**cells, "moved": bar(density, width=_BAR, ascii_only=ascii_only)}
        for cells, density in _groups("layer", rows, lambda row: _layer(row[0]))
    ]
    by_kind = [cells for cells, _ in _groups("kind", rows, lambda row: row[1])]
    return "\n".join(
        [
            pair["pair"],
            f"{percent(1 - changed / entries)} same bits, density {percent(changed / entries)} "
            f"({coverage})",
            "",
            table(by_layer, right=["layer", *numbers]),
            "",
            table(by_kind, right=numbers),
        ]
    )


def _layer(number: int | None) -> str:
    return "-" if number is None else str(number)


def _groups(
    heading: str, rows: Iterable[Row], key: Callable[[Row], str]
) -> list[tuple[dict[str, object], float]]:
    counts: dict[str, list[int]] = defaultdict(lambda: [0, 0, 0])
    for row in rows:
        for i, count in enumerate(row[2:]):
            counts[key(row)][i] += count
    ordered = sorted(counts, key=lambda name: (not name.isdecimal(), len(name), name))
    if heading == "kind":
        ordered = sorted(counts)
    return [
        (
            {
                heading: name,
                "entries": f"{entries:,}",
                "updated": f"{changed:,}",
                "same bits": percent(1 - changed / entries),
                "within 1e-05": percent(1 - beyond / entries),
            },
            changed / entries,
        )
        for name in ordered
        for entries, changed, beyond in (counts[name],)
    ]


def _draws_blocks() -> bool:
    encoding = getattr(sys.__stdout__, "encoding", None) or "utf-8"
    try:
        "█▏".encode(encoding)
    except (UnicodeEncodeError, LookupError):
        return False
    return True


def say(config: pytest.Config, text: str) -> None:
    """Write a line on the terminal while tests run; a worker of xdist has none."""
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    if reporter is not None and not hasattr(config, "workerinput"):
        reporter.ensure_newline()
        reporter.write_line(text)


class TerminalStream(io.TextIOBase):
    """The terminal that pytest writes to, past its capture, for progress bars."""

    def __init__(self, config: pytest.Config, reporter: pytest.TerminalReporter) -> None:
        """Write where `reporter` writes."""
        self._writer = config.get_terminal_writer()
        self._reporter = reporter
        self._started = False

    @classmethod
    def of(cls, config: pytest.Config) -> TerminalStream | None:
        """The terminal of this process; None where nobody watches."""
        reporter = config.pluginmanager.get_plugin("terminalreporter")
        if reporter is None or hasattr(config, "workerinput") or not reporter.isatty:
            return None
        return cls(config, reporter)

    def isatty(self) -> bool:
        """A person is watching: otherwise there is no stream."""
        return True

    def write(self, text: str) -> int:
        """Write `text` as it is; the first time on a line of its own."""
        if not self._started:
            self._reporter.ensure_newline()
            self._started = True
        self._writer.write(text, flush=True)
        return len(text)

    def flush(self) -> None:
        """All is written at once."""
