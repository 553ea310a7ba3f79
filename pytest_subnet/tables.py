"""Rows to text: the one place that calls tabulate."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pytest_subnet.text import safe

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_EIGHTHS = " ▏▎▍▌▋▊▉"


def table(rows: Sequence[Mapping[str, object]], *, right: Sequence[str] = ()) -> str:
    """Rows as aligned text, headed by the keys of the first one.

    Args:
        rows: every row has the same keys; values are shown as they print, escaped.
        right: columns to align to the right, for numbers that are already formatted.

    >>> print(table([{"kind": "norm", "updated": "12"}], right=["updated"]))
    kind      updated
    ------  ---------
    norm           12
    """
    if not rows:
        return "(nothing to show)"
    from tabulate import tabulate  # deferred: only a run that shows a table pays for it

    header = list(rows[0])
    return tabulate(
        [[safe(row[column]) for column in header] for row in rows],
        headers=header,
        colalign=["right" if column in right else "left" for column in header],
        disable_numparse=True,
    )


def bar(fraction: float, *, width: int = 20, ascii_only: bool = False) -> str:
    """A horizontal bar that fills `fraction` of `width` columns; anything above zero shows.

    >>> bar(0.5, width=4), bar(0.5, width=4, ascii_only=True)
    ('██  ', '##  ')
    """
    fraction = min(max(fraction, 0.0), 1.0)
    if ascii_only:
        full = max(round(fraction * width), int(fraction > 0))
        return ("#" * full).ljust(width)
    eighths = max(round(fraction * width * 8), int(fraction > 0))
    full, rest = divmod(eighths, 8)
    return ("█" * full + (_EIGHTHS[rest] if rest else "")).ljust(width)
