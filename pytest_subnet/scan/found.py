"""What a mask kernel fills: the bits of a work unit, and what is counted of them by stratum.

The stratum of an entry is `2 * exponent + (mantissa == 0)` of its base word, with the exponent bits
as they are stored: small weights change in every run, so two masks are compared stratum by stratum.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from pytest_subnet.scan.tolerance import Tolerance

STRATA = {"bfloat16": 512, "float16": 64}
"""The dtypes of 16-bit storage, and how many strata each has; wider ones have none."""


def rounded_to(dtype: str, tuned_dtype: str) -> str | None:
    """The 16-bit dtype to which an update was rounded; None where it was not.

    A cast back to float32 does not bring back what storage took, and a base in 16 bits alone takes
    nothing from an update that is kept in float32.

    Args:
        dtype: in which base and tuned are compared.
        tuned_dtype: as which the tuned checkpoint stores its weights.
    """
    if dtype in STRATA:
        return dtype
    return tuned_dtype if tuned_dtype in STRATA else None


class Found:
    """Bits and strata of some segments.

    Attributes:
        tolerance: an entry's bit is set when it is beyond.
        words: uint64, the bits of all segments, each padded with zeros to whole words.
        starts: int64 `[segments + 1]`: segment `i` is the words `starts[i]` up to `starts[i + 1]`.
        population: int64 `[segments, strata]`: entries by stratum.
        members: int64 `[segments, strata]`: of these, those that are updated.
    """

    __slots__ = ("members", "population", "starts", "tolerance", "words")

    def __init__(self, bounds: NDArray[np.int64], dtype: str, tolerance: Tolerance) -> None:
        """Nothing marked yet in segments with these bounds."""
        self.tolerance = tolerance
        self.starts = np.zeros(bounds.size, np.int64)
        np.cumsum(-(-np.diff(bounds) // 64), out=self.starts[1:])
        self.words: NDArray[np.uint64] = np.zeros(int(self.starts[-1]), np.uint64)
        self.population: NDArray[np.int64]
        self.members: NDArray[np.int64]
        self.count_as(dtype)

    def count_as(self, dtype: str) -> None:
        """Take the strata of `dtype`, with nothing counted in any."""
        shape = self.starts.size - 1, STRATA.get(dtype, 0)
        self.population = np.zeros(shape, np.int64)
        self.members = np.zeros(shape, np.int64)

    def mark(self, row: int, flags: NDArray[np.bool_], start: int = 0) -> None:
        """Set the bits of segment `row` from entry `start`, a multiple of 64, on."""
        first = int(self.starts[row]) + start // 64
        bits = np.packbits(flags, bitorder="little")
        self.words[first : int(self.starts[row + 1])].view(np.uint8)[: bits.size] = bits

    def count(self, row: int, words: NDArray[np.uint16], flags: NDArray[np.bool_]) -> None:
        """Count entries of segment `row`; does nothing where the dtype has no strata."""
        strata = self.population.shape[1]
        if strata:
            each = stratum_of(words, strata)
            self.population[row] += np.bincount(each, minlength=strata)
            self.members[row] += np.bincount(each[flags], minlength=strata)

    def clear(self) -> None:
        """Forget everything."""
        for counts in (self.words, self.population, self.members):
            counts[...] = 0


def stratum_of(words: NDArray[np.uint16], strata: int) -> NDArray[np.intp]:
    """The stratum of each 16-bit word, of a dtype that has so many."""
    exponents = strata // 2
    mantissa = 0x8000 // exponents  # what is left of 15 bits
    exponent = words // mantissa & exponents - 1
    return np.asarray(exponent.astype(np.intp) * 2 + (words & mantissa - 1 == 0), np.intp)


class StrataCounts(NamedTuple):
    """Counts by stratum of some tensors, without the zeros: one entry a stratum that occurs.

    Attributes:
        rows: int64, which tensor; ascending.
        strata: int64, which stratum of it; ascending within a tensor.
        population: int64, its entries.
        members: int64, those in the mask.
    """

    rows: NDArray[np.int64]
    strata: NDArray[np.int64]
    population: NDArray[np.int64]
    members: NDArray[np.int64]

    @classmethod
    def of(cls, found: Found, rows: NDArray[np.int64]) -> StrataCounts:
        """What was found in segments that belong to the tensors `rows`."""
        segment, stratum = np.nonzero(found.population)
        return cls(
            rows[segment],
            stratum.astype(np.int64),
            found.population[segment, stratum],
            found.members[segment, stratum],
        )


def merged(parts: list[StrataCounts]) -> StrataCounts:
    """The parts added up."""
    if not parts:
        nothing = np.empty(0, np.int64)
        return StrataCounts(nothing, nothing, nothing, nothing)
    rows, strata, population, members = (
        np.concatenate(columns) for columns in zip(*parts, strict=True)
    )
    order = np.lexsort((strata, rows))
    rows, strata = rows[order], strata[order]
    is_first = np.ones(rows.size, np.bool_)
    is_first[1:] = (np.diff(rows) != 0) | (np.diff(strata) != 0)
    firsts = np.flatnonzero(is_first)
    if not firsts.size:
        return StrataCounts(rows, strata, population, members)
    return StrataCounts(
        rows[firsts],
        strata[firsts],
        np.add.reduceat(population[order], firsts),
        np.add.reduceat(members[order], firsts),
    )
