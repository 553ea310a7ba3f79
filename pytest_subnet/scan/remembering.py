"""What is remembered of a unit from one checkpoint of a run to the next."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, TypeAlias

import numpy as np

from pytest_subnet.checkpoints.dtypes import ARITHMETIC, DTYPES
from pytest_subnet.scan import bits_kernel
from pytest_subnet.scan.counters import (
    CHANGED,
    FIRST_TOLERANCE,
    NONFINITE_BASE,
    NONFINITE_TUNED,
    ZERO_FLIPS,
    Counters,
)
from pytest_subnet.scan.updated_entries import updated_entries

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from pytest_subnet.scan.contracts import Kernel
    from pytest_subnet.scan.tolerance import Tolerance
    from pytest_subnet.scan.units import ScanUnit

    Bytes: TypeAlias = NDArray[np.uint8]
    Integers: TypeAlias = NDArray[np.int64]

UPDATED, STEPPED, EVER, OUTSIDE = range(4)
"""Rows of `Part.entries`: updated against the start, against the checkpoint before, against the
start in this checkpoint or an earlier one, and of the latter those not updated in the last one."""

_PIECE = 1 << 17
"""Entries looked at at once, so that what is made of them stays in the cache."""


class Part(NamedTuple):
    """What is counted of a unit, a row for each of its segments and a column for each step.

    Attributes:
        rows: which tensors they belong to, each once.
        entries: int64 `[segments, tolerances, 4, steps]`.
        moved: int64 `[segments, steps]`, entries with other bits than in the checkpoint before,
            without the zeros that only changed their sign.
        nonfinite: int64 `[segments, steps + 1]`, NaN and Inf; the start's first.
    """

    rows: list[int]
    entries: Integers
    moved: Integers
    nonfinite: Integers


class UnitMemory:
    """Takes one checkpoint after the other and keeps, of each entry, when it was first updated."""

    def __init__(
        self,
        start: Bytes,
        unit: ScanUnit,
        steps: int,
        kernel: Kernel,
        tolerances: tuple[Tolerance, ...],
    ) -> None:
        """Begin with the bytes of the first checkpoint, which must stay as they are."""
        counts = [segment.count for segment in unit.segments]
        self._start = self._previous = start
        self._dtype = unit.dtype
        self._kernel = kernel if unit.dtype in ARITHMETIC else bits_kernel.compare
        self._tolerances = tolerances
        self._bounds = np.zeros(len(counts) + 1, np.int64)
        np.cumsum(counts, out=self._bounds[1:])
        self._steps, self._step = steps, 0
        # The step in which an entry was first updated, 0 until it was.
        self._first = np.zeros((len(tolerances), unit.count), np.min_scalar_type(steps))
        self._final = np.zeros((len(tolerances), unit.count), np.bool_)
        self._part = Part(
            [segment.row for segment in unit.segments],
            np.zeros((len(counts), len(tolerances), 4, steps), np.int64),
            np.zeros((len(counts), steps), np.int64),
            np.zeros((len(counts), steps + 1), np.int64),
        )

    def take(self, current: Bytes) -> None:
        """The bytes of the next checkpoint, which must stay as they are until the one after it."""
        column = self._step
        self._step += 1
        from_start = self._compare(self._start, current)
        step = self._compare(self._previous, current) if column else from_start
        entries, moved, nonfinite = self._part[1:]
        entries[:, :, UPDATED, column] = self._updated(from_start)
        entries[:, :, STEPPED, column] = self._updated(step)
        moved[:, column] = step.integers[:, CHANGED] - step.integers[:, ZERO_FLIPS]
        nonfinite[:, 0] = from_start.integers[:, NONFINITE_BASE]
        nonfinite[:, self._step] = from_start.integers[:, NONFINITE_TUNED]
        if from_start.integers[:, CHANGED].any():
            self._mark(current)
        self._previous = current

    def part(self) -> Part:
        """All that was counted, once the last checkpoint was taken."""
        for row in range(len(self._part.rows)):
            for number in range(len(self._tolerances)):
                entries = self._part.entries[row, number]
                for piece in _pieces(self._bounds[row], self._bounds[row + 1]):
                    first, final = self._first[number, piece], self._final[number, piece]
                    entries[EVER] += self._by_step(first)
                    entries[OUTSIDE] += self._by_step(first[~final])
        return self._part

    def _compare(self, base: Bytes, tuned: Bytes) -> Counters:
        counters = Counters(
            len(self._part.rows), [each for each in self._tolerances if not each.same_bits]
        )
        self._kernel(base, tuned, self._dtype, self._bounds, counters)
        return counters

    def _updated(self, counted: Counters) -> Integers:
        """int64 `[segments, tolerances]`."""
        columns = [
            CHANGED if each.same_bits else FIRST_TOLERANCE + counted.tolerances.index(each)
            for each in self._tolerances
        ]
        return counted.integers[:, columns]

    def _mark(self, current: Bytes) -> None:
        size = DTYPES[self._dtype].itemsize
        for piece in _pieces(0, self._first.shape[1]):
            run = slice(piece.start * size, piece.stop * size)
            updated = updated_entries(self._start[run], current[run], self._dtype, self._tolerances)
            for number, now in enumerate(updated):
                first = self._first[number, piece]
                first[now & (first == 0)] = self._step
                if self._step == self._steps:
                    self._final[number, piece] = now

    def _by_step(self, first: NDArray[np.unsignedinteger]) -> Integers:
        """How many entries had been updated by each step, int64 `[steps]`."""
        return np.cumsum(np.bincount(first[first > 0], minlength=self._steps + 1)[1:])


def _pieces(start: int, end: int) -> Iterator[slice]:
    for first in range(int(start), int(end), _PIECE):
        yield slice(first, min(first + _PIECE, int(end)))
