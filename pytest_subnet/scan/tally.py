"""What has been counted of the tensors of one pair."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from pytest_subnet.scan.counters import FIRST_TOLERANCE, Counters

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from numpy.typing import NDArray

    from pytest_subnet.scan.tolerance import Tolerance


class Tally:
    """Counts of a pair as far as they are known, a row for each of its tensors."""

    def __init__(self, rows: int) -> None:
        """Know nothing yet."""
        self._counters = Counters(rows, ())
        self._scanned = np.zeros(rows, bool)
        self._beyond: dict[Tolerance, NDArray[np.int64]] = {}

    def missing(self, rows: NDArray[np.intp], tolerance: Tolerance) -> NDArray[np.intp]:
        """Those of `rows` that have not been counted under `tolerance`."""
        if tolerance.same_bits:
            return rows[~self._scanned[rows]]
        beyond = self._beyond.get(tolerance)
        return rows if beyond is None else rows[beyond[rows] < 0]

    def missing_any(
        self, rows: NDArray[np.intp], tolerances: Iterable[Tolerance]
    ) -> NDArray[np.intp]:
        """Those of `rows`, each once, that have not been counted under all of `tolerances`."""
        parts = [rows[~self._scanned[rows]], *(self.missing(rows, each) for each in tolerances)]
        return np.unique(np.concatenate(parts))

    def keep(self, rows: NDArray[np.intp], counted: Counters) -> None:
        """Keep what was counted of `rows`; -1 beyond a tolerance is not known."""
        self._counters.integers[rows] = counted.integers[rows, :FIRST_TOLERANCE]
        self._counters.sums[rows] = counted.sums[rows]
        self._counters.peaks[rows] = counted.peaks[rows]
        self._scanned[rows] = True
        for k, tolerance in enumerate(counted.tolerances):
            unknown = np.full(len(self._scanned), -1, np.int64)
            self._beyond.setdefault(tolerance, unknown)[rows] = counted.integers[
                rows, FIRST_TOLERANCE + k
            ]

    def merge(self, other: Tally) -> None:
        """Keep what another tally of the same pair knows and this one does not."""
        rows = np.flatnonzero(other._scanned & ~self._scanned)
        self.keep(rows, other.counters(()))
        for tolerance, theirs in other._beyond.items():
            ours = self._beyond.setdefault(tolerance, np.full_like(theirs, -1))
            ours[ours < 0] = theirs[ours < 0]

    def counters(self, tolerances: Sequence[Tolerance]) -> Counters:
        """All that is known, -1 in the column of a tolerance where it was not counted."""
        found = Counters(len(self._scanned), tolerances)
        found.integers[:, :FIRST_TOLERANCE] = self.integers
        found.sums[:], found.peaks[:] = self.sums, self.peaks
        for k, tolerance in enumerate(found.tolerances):
            found.integers[:, FIRST_TOLERANCE + k] = self._beyond.get(tolerance, -1)
        return found

    @property
    def scanned(self) -> NDArray[np.intp]:
        """The rows that have been read."""
        return np.flatnonzero(self._scanned)

    @property
    def tolerances(self) -> tuple[Tolerance, ...]:
        """Under which some rows have been counted, besides same bits."""
        return tuple(self._beyond)

    @property
    def integers(self) -> NDArray[np.int64]:
        """As `Counters.integers`, without the tolerances; zero where not scanned."""
        return self._counters.integers

    @property
    def sums(self) -> NDArray[np.float64]:
        """As `Counters.sums`."""
        return self._counters.sums

    @property
    def peaks(self) -> NDArray[np.float64]:
        """As `Counters.peaks`."""
        return self._counters.peaks

    def updated(self, tolerance: Tolerance) -> NDArray[np.int64]:
        """How many entries of each tensor are updated under a tolerance that was counted."""
        return self.integers[:, 0] if tolerance.same_bits else self._beyond[tolerance]
