"""The words of a failure: numbers that can be told apart, bounds that can be pasted."""

from __future__ import annotations

import math
from decimal import ROUND_CEILING, ROUND_FLOOR, Decimal
from typing import TYPE_CHECKING, Protocol, TypeVar

from pytest_subnet.text import column, safe, spell_tensor

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

WORST = 3
"""How many of the worst tensors a failure shows."""


class Shown(Protocol):
    """What a message shows of a tensor, whatever was measured of it."""

    @property
    def name(self) -> str:
        """Its name in the base."""

    @property
    def dtype(self) -> str:
        """In which dtype it was compared."""

    @property
    def shape(self) -> tuple[int, ...]:
        """What was compared of it."""


Tensor = TypeVar("Tensor", bound=Shown)


def share_against(share: float, bound: float) -> tuple[str, str]:
    """A share and its bound as percent, told apart from each other and from 0 % and 100 %.

    >>> share_against(0.7184, 0.80), share_against(0.999999, 0.90)
    (('71.84%', '80.00%'), ('99.9999%', '90.0000%'))
    """
    share, bound = float(share), float(bound)
    for digits in range(2, 16):
        texts = f"{share * 100:.{digits}f}%", f"{bound * 100:.{digits}f}%"
        extremes = {f"{edge:.{digits}f}%" for edge in (0, 100) if share * 100 != edge}
        if texts[0] != texts[1] and texts[0] not in extremes:
            return texts
    return repr(share), repr(bound)


def number_against(value: float, bound: float) -> tuple[str, str]:
    """A number and its bound with as many digits as it takes to tell them apart.

    >>> number_against(0.25, 0.1), number_against(0.10001, 0.1)
    (('0.25', '0.1'), ('0.10001', '0.1'))
    """
    value, bound = float(value), float(bound)
    for digits in range(3, 17):
        texts = f"{value:.{digits}g}", f"{bound:.{digits}g}"
        if texts[0] != texts[1]:
            return texts
    return repr(value), repr(bound)


def bound_below(share: float) -> str | None:
    """A share as a lower bound that it meets; None when only 0 is one.

    Two digits of what is left to the nearer end of [0, 1] are kept.

    >>> bound_below(0.7184), bound_below(0.99987), bound_below(0.00123), bound_below(0.0)
    ('0.71', '0.99987', '0.0012', None)
    """
    return _rounded(share, _digits(share), ROUND_FLOOR) if share > 0 else None


def bound_above(share: float) -> str | None:
    """A share as an upper bound that it meets; None when only 1 is one.

    >>> bound_above(0.7184), bound_above(0.99987), bound_above(0.00123), bound_above(1.0)
    ('0.72', '0.99987', '0.0013', None)
    """
    return _rounded(share, _digits(share), ROUND_CEILING) if share < 1 else None


def limit_above(value: float) -> str | None:
    """A number as an upper bound that it meets; None when no finite one is.

    >>> limit_above(0.0124), limit_above(1234.5), limit_above(0.0), limit_above(math.inf)
    ('0.013', '1300.0', '0.0', None)
    """
    if not math.isfinite(value):
        return None
    text = _rounded(value, 1 - Decimal(value).adjusted(), ROUND_CEILING)
    return text if math.isfinite(float(text)) else repr(value)


def _digits(share: float) -> int:
    least = min(share, 1 - share)
    return max(2, 1 - Decimal(least).adjusted()) if least else 2


def _rounded(value: float, digits: int, rounding: str) -> str:
    # By the shortest decimal that means this float: 0.29 stays 0.29, though it is stored below it.
    # Digits enough for any float: the default context refuses to write 1e300 out.
    shortest = Decimal(repr(float(value)))
    step = Decimal(1).scaleb(-digits)
    return repr(float((shortest / step).to_integral_value(rounding) * step))


def worst(
    tensors: Sequence[Tensor], numbers: Callable[[Tensor], Sequence[str]]
) -> list[tuple[str, str]]:
    """The rows of a message for the first few of `tensors`: name, numbers, dtype and shape.

    Args:
        tensors: worst first.
        numbers: what is shown of each, as columns; the first is aligned to the right, and one that
            is empty everywhere is left out.
    """
    rows = [
        (safe(each.name), *numbers(each), f"({spell_tensor(each.dtype, each.shape)})")
        for each in tensors[:WORST]
    ]
    columns = [column for column in zip(*rows, strict=True) if any(column)]
    widths = [max(map(len, column)) for column in columns]
    lines = [
        "  ".join(
            cell.rjust(width) if number == 1 else cell.ljust(width)
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in zip(*columns, strict=True)
    ]
    hidden = len(tensors) - WORST
    if hidden > 0:
        lines.append(f"… {hidden:,} more")
    return column("worst", lines)
