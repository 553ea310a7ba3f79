"""What a scan counts."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from pytest_subnet.scan.tolerance import Tolerance

CHANGED, ZERO_FLIPS, NONFINITE_BASE, NONFINITE_TUNED = range(4)
"""Columns of `Counters.integers`; one column for each tolerance follows."""

FIRST_TOLERANCE = 4

DELTA_SQUARES, BASE_SQUARES, TUNED_SQUARES = range(3)
"""Columns of `Counters.sums`: differences of what is finite on both sides; each side by itself."""


class Counters:
    """The counts of some rows (segments of a work unit, or tensors of a pair).

    Integers are exact and the same from every kernel, engine and number of threads. Sums are good
    to about 1e-6 and the same for every number of threads: they are added in a fixed order.

    Attributes:
        tolerances: what the columns from `FIRST_TOLERANCE` on count beyond, none of them same
            bits: that is the column `CHANGED`.
        integers: int64 `[rows, 4 + tolerances]`: entries with other bits, of these zeros whose sign
            flipped, non-finite entries in base and in tuned, entries beyond each tolerance.
        sums: float64 `[rows, 3]`: sums of squares of delta, base and tuned.
        peaks: float64 `[rows]`: the largest |delta| between finite entries.
    """

    __slots__ = ("integers", "peaks", "sums", "tolerances")

    def __init__(self, rows: int, tolerances: Sequence[Tolerance]) -> None:
        """All zero."""
        self.tolerances = tuple(tolerances)
        self.integers: NDArray[np.int64] = np.zeros(
            (rows, FIRST_TOLERANCE + len(self.tolerances)), np.int64
        )
        self.sums: NDArray[np.float64] = np.zeros((rows, 3))
        self.peaks: NDArray[np.float64] = np.zeros(rows)

    def add(self, rows: NDArray[np.intp], part: Counters) -> None:
        """Add the rows of `part` to `rows` of this; each row occurs once in `rows`."""
        self.integers[rows] += part.integers
        self.sums[rows] += part.sums
        # As words, in which numbers >= 0 keep their order: this thread may flush subnormals to 0.
        known, further = self.peaks.view(np.int64), part.peaks.view(np.int64)
        known[rows] = np.maximum(known[rows], further)
