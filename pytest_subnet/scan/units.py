"""Work units: a pair cut into pieces that can be read and compared anywhere."""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING, NamedTuple

from pytest_subnet.checkpoints.base import Extent
from pytest_subnet.checkpoints.dtypes import DTYPES

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from pytest_subnet.checkpoints import Checkpoint
    from pytest_subnet.pairs import ModelPair

UNIT_BYTES = 16 * 1024 * 1024
"""Bytes a side; large enough that what the interpreter does for each does not count."""


class Segment(NamedTuple):
    """A run of entries of one tensor.

    Attributes:
        row: where in `pair.tensors` it belongs.
        base_name: the name under which the base stores it.
        tuned_name: the name under which the tuned checkpoint stores it.
        start: its first entry.
        count: how many entries.
    """

    row: int
    base_name: str
    tuned_name: str
    start: int
    count: int  # type: ignore[assignment]  # hides tuple.count, which no one calls here


class ScanUnit(NamedTuple):
    """A few MB of a pair: paths, names, byte ranges and dtypes, never a tensor.

    Its segments lie one after the other on each side, so that a kernel sees two packed buffers.

    Attributes:
        number: its place in the order in which results are added.
        segments: what it covers; a tensor occurs at most once.
        dtype: in which dtype the entries are compared.
        base_dtype: as which the base stores them.
        tuned_dtype: as which the tuned checkpoint stores them.
        base: where the base's bytes are in files, in order; None when they are in memory.
        tuned: where the tuned checkpoint's bytes are, likewise.
    """

    number: int
    segments: tuple[Segment, ...]
    dtype: str
    base_dtype: str
    tuned_dtype: str
    base: tuple[Extent, ...] | None
    tuned: tuple[Extent, ...] | None

    @property
    def count(self) -> int:  # type: ignore[override]  # likewise
        """Number of entries."""
        return sum(segment.count for segment in self.segments)

    @property
    def nbytes(self) -> int:
        """Bytes to read, both sides together."""
        return self.count * (DTYPES[self.base_dtype].itemsize + DTYPES[self.tuned_dtype].itemsize)


def cut(pair: ModelPair, rows: Iterable[int], unit_bytes: int | None = None) -> list[ScanUnit]:
    """Cut the tensors `rows` of `pair` into work units of at most `unit_bytes` a side.

    Large tensors are split; small neighbours of one dtype share a unit, so that a checkpoint of
    many small tensors is read in large pieces.
    """

    def dtypes_of(row: int) -> tuple[str, str, str]:
        tensor = pair.tensors[row]
        return tensor.dtype, tensor.base_dtype, tensor.tuned_dtype

    units: list[ScanUnit] = []
    for dtypes, neighbours in groupby(rows, dtypes_of):
        capacity = (unit_bytes or UNIT_BYTES) // max(DTYPES[dtype].itemsize for dtype in dtypes)
        for segments in _batches(pair, neighbours, capacity):
            units.append(_unit(pair, len(units), segments, dtypes))
    return units


def _batches(pair: ModelPair, rows: Iterable[int], capacity: int) -> Iterator[list[Segment]]:
    batch: list[Segment] = []
    room = capacity
    for row in rows:
        tensor = pair.tensors[row]
        numel = tensor.numel
        for start in range(0, numel, capacity):
            count = min(capacity, numel - start)
            if count > room:
                yield batch
                batch, room = [], capacity
            batch.append(Segment(row, tensor.base_name, tensor.tuned_name, start, count))
            room -= count
    if batch:
        yield batch


def _unit(
    pair: ModelPair, number: int, segments: Sequence[Segment], dtypes: tuple[str, str, str]
) -> ScanUnit:
    dtype, base_dtype, tuned_dtype = dtypes
    base = ((s.base_name, s.start, s.count) for s in segments)
    tuned = ((s.tuned_name, s.start, s.count) for s in segments)
    return ScanUnit(
        number,
        tuple(segments),
        dtype,
        base_dtype,
        tuned_dtype,
        _extents(pair.base, base, DTYPES[base_dtype].itemsize),
        _extents(pair.tuned, tuned, DTYPES[tuned_dtype].itemsize),
    )


def _extents(
    checkpoint: Checkpoint, runs: Iterable[tuple[str, int, int]], itemsize: int
) -> tuple[Extent, ...] | None:
    """Where runs of entries are in files; what lies one after the other is one extent."""
    joined: list[Extent] = []
    path, offset, end = "", 0, 0
    for name, start, count in runs:
        found = checkpoint.extents(name, start * itemsize, count * itemsize)
        if found is None:
            return None
        for extent in found:
            if extent.offset != end or extent.path != path:
                if end > offset:
                    joined.append(Extent(path, offset, end - offset))
                path, offset, end = extent.path, extent.offset, extent.offset
            end += extent.nbytes
    return (*joined, Extent(path, offset, end - offset))


def halves(unit: ScanUnit) -> tuple[ScanUnit, ScanUnit] | None:
    """`unit` cut in the middle, for where there is no room for it; None where it is one entry.

    A segment that lies on the cut is in both.
    """
    middle = unit.count // 2
    if not middle:
        return None
    first, second = _split(unit.segments, middle)
    return (
        unit._replace(
            segments=first,
            base=_part(unit.base, 0, middle * DTYPES[unit.base_dtype].itemsize),
            tuned=_part(unit.tuned, 0, middle * DTYPES[unit.tuned_dtype].itemsize),
        ),
        unit._replace(
            segments=second,
            base=_part(unit.base, middle * DTYPES[unit.base_dtype].itemsize),
            tuned=_part(unit.tuned, middle * DTYPES[unit.tuned_dtype].itemsize),
        ),
    )


def _split(
    segments: Sequence[Segment], entries: int
) -> tuple[tuple[Segment, ...], tuple[Segment, ...]]:
    """The first `entries` entries of some segments, and the others."""
    first: list[Segment] = []
    second: list[Segment] = []
    for segment in segments:
        taken = min(segment.count, entries)
        left = segment.count - taken
        if taken:
            first.append(segment._replace(count=taken))
        if left:
            second.append(segment._replace(start=segment.start + taken, count=left))
        entries -= taken
    return tuple(first), tuple(second)


def _part(
    extents: Sequence[Extent] | None, start: int, stop: int | None = None
) -> tuple[Extent, ...] | None:
    """The bytes from `start` up to `stop` of some extents."""
    if extents is None:
        return None
    found = []
    end = sum(extent.nbytes for extent in extents) if stop is None else stop
    position = 0
    for path, offset, nbytes in extents:
        first, last = max(start - position, 0), min(end - position, nbytes)
        if first < last:
            found.append(Extent(path, offset + first, last - first))
        position += nbytes
    return tuple(found)
