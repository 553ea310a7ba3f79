"""Tables as wide as the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pytest_subnet.tables import table

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_NARROWEST = 12
"""What is left of a name however narrow the terminal is."""


def fitted(rows: Sequence[Mapping[str, str]], *, numbers: Sequence[str], width: int) -> str:
    """Rows as a table of at most `width` columns, for which the first cells are shortened.

    Args:
        rows: the name first; none that prints otherwise than it is.
        numbers: columns to align to the right.
        width: of the terminal.
    """
    text = table(rows, right=numbers)
    name = next(iter(rows[0]))
    longest = max(len(row[name]) for row in rows)
    excess = max(map(len, text.splitlines())) - width
    if excess <= 0:
        return text
    room = max(longest - excess, _NARROWEST)
    return table([{**row, name: _shortened(row[name], room)} for row in rows], right=numbers)


def _shortened(name: str, room: int) -> str:
    """`name` without its middle, where it is longer than `room`: names differ at both ends."""
    if len(name) <= room:
        return name
    head = (room - 1) // 2
    return f"{name[:head]}…{name[head + 1 - room :]}"
