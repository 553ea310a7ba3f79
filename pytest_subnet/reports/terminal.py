"""The end of a run on the terminal: what moved, by layer and by kind."""

from __future__ import annotations

import io
import math
import shutil
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

    from pytest_subnet.reports.scanned import PairTable, Row

KeyT = TypeVar("KeyT")

_BAR = 20
_WORST = 5
_NARROWEST = 24
"""Columns that are left to the name of a tensor, however narrow the terminal."""
_BLOCKS = "▁▂▃▄▅▆▇█"
_DIGITS = "12345678"
_GAP = 2
_NUMBERS = ("entries", "updated", "same bits", "within 1e-05")
_LESS = ("entries", "within 1e-05", "updated", "moved")
"""Columns that a narrow terminal does without, the first one first."""


def write_summary(
    reporter: pytest.TerminalReporter, tables: Sequence[PairTable], *, verbose: bool = False
) -> None:
    """Write a section on every pair that was scanned."""
    if not tables:
        return
    reporter.write_sep("=", "subnet: what moved")
    width = shutil.get_terminal_size().columns
    ascii_only = not draws_blocks(sys.__stdout__)
    for number, each in enumerate(tables):
        if number:
            reporter.write_line("")
        text = summary(each, ascii_only=ascii_only, width=width, verbose=verbose)
        for line in text.splitlines():
            reporter.write_line(no_command(line))


def summary(
    pair: PairTable, *, ascii_only: bool = False, width: int = 100, verbose: bool = False
) -> str:
    """What moved in one pair: the tensors that moved most, the layers at a glance, the kinds.

    Args:
        pair: what was scanned.
        ascii_only: whether the terminal has no blocks.
        width: its columns; tables do without some of theirs, and names are cut, to fit.
        verbose: show every layer and every tensor.
    """
    rows = list(pair["rows"].values())
    counts = _add(rows)
    dtypes = "+".join(sorted({dtype for _, _, dtype, *_ in rows}))
    moved = sorted((row for row in rows if row[4]), key=_by_share)
    parts = [
        *(_tensors(moved[:_WORST], len(moved), width) if not verbose else []),
        *_layers(rows, ascii_only=ascii_only, width=width, verbose=verbose),
        _kinds(rows, width),
        *(_tensors(sorted(rows, key=_by_share), len(rows), width) if verbose else []),
    ]
    return "\n".join(
        [
            pair["pair"],
            f"{percent(1 - counts.density)} same bits, density {percent(counts.density)} "
            f"({dtypes}, {len(rows):,}/{pair['total']:,} tensors, "
            f"{plural(counts.entries, 'entry')})",
            *(f"note: {note}" for note in pair["notes"]),
            *_from_cache(pair),
            *(f"\n{part}" for part in parts),
        ]
    )


def _by_share(row: Row) -> tuple[float, int]:
    """What moved most comes first; of equals, the larger."""
    return -row[4] / row[3] if row[3] else 0.0, -row[3]


def _tensors(rows: Sequence[Row], total: int, width: int) -> list[str]:
    if not rows:
        return []
    cells = [
        {"layer": "-" if row[0] is None else f"{row[0]}", **_add([row]).cells()} for row in rows
    ]
    columns = _fitting(cells, width - _NARROWEST - _GAP)
    widths = _widths(cells)
    room = max(width - sum(widths[column] for column in columns), _NARROWEST)
    named = [
        {**{column: each[column] for column in columns}, "tensor": _cut(row[6], room)}
        for each, row in zip(cells, rows, strict=True)
    ]
    left = total - len(rows)
    more = f"\n… {plural(left, 'more tensor')} moved; -v shows all" if left else ""
    return [table(named, right=["layer", *_NUMBERS]) + more]


def _layers(rows: Sequence[Row], *, ascii_only: bool, width: int, verbose: bool) -> list[str]:
    """A row for each layer with a bar, or a letter for each where a glance is enough."""
    groups = _groups(rows, key=lambda row: row[0])
    in_order = sorted(groups.items(), key=lambda item: (item[0] is None, item[0]))
    if verbose:
        cells = [
            {
                "layer": "-" if layer is None else f"{layer}",
                **group.cells(),
                "moved": bar(group.density, width=_BAR, ascii_only=ascii_only),
            }
            for layer, group in in_order
        ]
        return [_fitted(cells, width)]
    numbered = [(layer, group.density) for layer, group in in_order if layer is not None]
    return [_strip(numbered, ascii_only=ascii_only, width=width)] if numbered else []


def _strip(layers: Sequence[tuple[int, float]], *, ascii_only: bool, width: int) -> str:
    """A block for each layer, the highest for the one that moved most; none for none."""
    highest = max(density for _, density in layers)
    steps = _DIGITS if ascii_only else _BLOCKS
    letters = "".join(
        steps[math.ceil(density / highest * len(steps)) - 1] if density else "."
        for _, density in layers
    )
    first, last = layers[0][0], layers[-1][0]
    head = f"layers {first}-{last}  " if first != last else f"layer {first}  "
    room = max(width - len(head), _NARROWEST)
    pieces = [letters[start : start + room] for start in range(0, len(letters), room)]
    lines = [
        f"{head if not number else ' ' * len(head)}{line}" for number, line in enumerate(pieces)
    ]
    scale = f"{steps[-1]} = {percent(highest)} updated, . = nothing" if highest else "nothing moved"
    return "\n".join([*lines, f"{' ' * len(head)}{scale}"])


def _kinds(rows: Sequence[Row], width: int) -> str:
    groups = _groups(rows, key=lambda row: row[1])
    in_order = sorted(groups.items(), key=lambda item: (-item[1].density, item[0]))
    return _fitted([{"kind": _cut(kind, 40), **group.cells()} for kind, group in in_order], width)


def _fitted(rows: Sequence[dict[str, object]], width: int) -> str:
    """A table without the columns for which there is no room."""
    columns = _fitting(rows, width)
    kept = [{column: row[column] for column in columns} for row in rows]
    return table(kept, right=["layer", *_NUMBERS])


def _fitting(rows: Sequence[dict[str, object]], width: int) -> list[str]:
    """The columns for which there is room."""
    widths = _widths(rows)
    for less in _LESS:
        if sum(widths.values()) - _GAP <= width:
            break
        widths.pop(less, None)
    return list(widths)


def _widths(rows: Sequence[dict[str, object]]) -> dict[str, int]:
    """What each column takes, with the gap after it; tabulate makes no column narrower."""
    return {
        column: max(len(column) + 2, *(len(str(row[column])) for row in rows)) + _GAP
        for column in rows[0]
    }


def _cut(name: str, width: int) -> str:
    """A name without its middle: its end says most."""
    if len(name) <= width:
        return name
    end = (width - 1) * 2 // 3
    return f"{name[: width - 1 - end]}…{name[-end:]}"


def no_command(line: str) -> str:
    """A line of a log on GitHub that is no command to its runner, whatever a name says."""
    line = line.replace("##[", "# #[")
    return f"'{line}" if line.lstrip().startswith("::") else line


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
        return self.changed / self.entries if self.entries else 0.0

    def cells(self) -> dict[str, object]:
        return {
            "entries": f"{self.entries:,}",
            "updated": f"{self.changed:,}",
            "same bits": percent(1 - self.density),
            "within 1e-05": percent(1 - self.beyond / (self.entries or 1)),
        }


def _add(rows: Iterable[Row]) -> _Counts:
    return _Counts(*(sum(column) for column in zip(*(row[3:6] for row in rows), strict=True)))


def _groups(rows: Iterable[Row], key: Callable[[Row], KeyT]) -> dict[KeyT, _Counts]:
    found: dict[KeyT, list[Row]] = defaultdict(list)
    for row in rows:
        found[key(row)].append(row)
    return {name: _add(members) for name, members in found.items()}


def draws_blocks(stream: TextIO | None) -> bool:
    """Whether `stream` can hold the characters of which bars are made."""
    encoding = getattr(stream, "encoding", None) or "utf-8"
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
