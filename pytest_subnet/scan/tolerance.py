"""When an entry counts as updated."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from numbers import Real

_PAPER_ATOL = 1e-5


@dataclass(frozen=True, slots=True)
class Tolerance:
    """How far apart two values may be and still count as the same.

    Neither: same bits. `atol`: |tuned - base| <= atol. `rtol`: |tuned - base| <= rtol times the
    larger of |base| and |tuned|. Differences are formed, and the tolerance is rounded to, float32
    for 16-bit floats and float64 for wider ones. A NaN or Inf is close to nothing but the same
    bits, and so are the entries of tensors that have no arithmetic here (integers, float8).

    Attributes:
        atol: absolute tolerance in weight units.
        rtol: relative tolerance.

    >>> str(Tolerance()), str(Tolerance(atol=1e-5))
    ('same bits', 'atol=1e-05')
    """

    atol: float | None = None
    rtol: float | None = None

    def __post_init__(self) -> None:
        """Refuse what cannot be meant."""
        for name, value in (("atol", self.atol), ("rtol", self.rtol)):
            if value is None:
                continue
            _check_number(name, value)
            if not 0 <= value <= sys.float_info.max:  # also NaN, and integers beyond a float
                raise ValueError(f"{name}={value!r} is not a finite number of at least 0")
        if self.atol is not None and self.rtol is not None:
            raise ValueError(
                f"atol={self.atol} and rtol={self.rtol}: give at most one, "
                "an entry is updated under one tolerance"
            )

    @property
    def same_bits(self) -> bool:
        """Whether only equal bits count as the same."""
        return self.atol is None and self.rtol is None

    def __str__(self) -> str:
        """As messages name it."""
        if self.same_bits:
            return "same bits"
        name, value = ("atol", self.atol) if self.rtol is None else ("rtol", self.rtol)
        short = f"{value:g}"  # unless it is the name of another number, too
        return f"{name}={short if float(short) == value else repr(value)}"


def _check_number(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name}={value!r} is not a number")


SAME_BITS = Tolerance()
PAPER = Tolerance(atol=_PAPER_ATOL)
"""The tolerance of arXiv 2505.11711, Table 1."""

DEFAULT_TOLERANCES = (SAME_BITS, PAPER)
"""Gathered in every scan, so that the two numbers can always be shown side by side."""
