"""Work units: a pair cut into pieces that can be read and compared anywhere."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from pytest_subnet.checkpoints.dtypes import DTYPES

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from pytest_subnet.checkpoints import Checkpoint, Extent
    from pytest_subnet.pairs import ModelPair, TensorPair

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
    count: int


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
    def count(self) -> int:
        """Number of entries."""
        return sum(segment.count for segment in self.segments)

    @property
    def nbytes(self) -> int:
        """Bytes to read, both sides together."""
        return self.count * (DTYPES[self.base_dtype].itemsize + DTYPES[self.tuned_dtype].itemsize)


def cut(pair: ModelPair, rows: Sequence[int]) -> list[ScanUnit]:
    """Cut the tensors `rows` of `pair` into work units.

    Large tensors are split; small neighbours of one dtype share a unit, so that a checkpoint of
    many small tensors is read in large pieces.
    """
    units: list[ScanUnit] = []
    batch: list[Segment] = []
    batch_dtypes: tuple[str, str, str] | None = None
    room = 0

    def close() -> None:
        if batch and batch_dtypes is not None:
            units.append(_unit(pair, len(units), batch, batch_dtypes))
            batch.clear()

    for row in rows:
        tensor = pair.tensors[row]
        dtypes = (tensor.dtype, tensor.base_dtype, tensor.tuned_dtype)
        if dtypes != batch_dtypes:
            close()
            batch_dtypes = dtypes
            room = capacity = _capacity(tensor)
        for segment in _segments(tensor, row, capacity):
            if segment.count > room:
                close()
                room = capacity
            batch.append(segment)
            room -= segment.count
    close()
    return units


def _capacity(tensor: TensorPair) -> int:
    return UNIT_BYTES // max(
        DTYPES[dtype].itemsize for dtype in (tensor.dtype, tensor.base_dtype, tensor.tuned_dtype)
    )


def _segments(tensor: TensorPair, row: int, capacity: int) -> Iterator[Segment]:
    for start in range(0, tensor.numel, capacity):
        count = min(capacity, tensor.numel - start)
        yield Segment(row, tensor.base_name, tensor.tuned_name, start, count)


def _unit(
    pair: ModelPair, number: int, segments: list[Segment], dtypes: tuple[str, str, str]
) -> ScanUnit:
    dtype, base_dtype, tuned_dtype = dtypes
    base = [(s.base_name, s.start, s.count) for s in segments]
    tuned = [(s.tuned_name, s.start, s.count) for s in segments]
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
    checkpoint: Checkpoint, runs: Sequence[tuple[str, int, int]], itemsize: int
) -> tuple[Extent, ...] | None:
    joined: list[Extent] = []
    for name, start, count in runs:
        found = checkpoint.extents(name, start * itemsize, count * itemsize)
        if found is None:
            return None
        for extent in found:
            if joined and _follows(joined[-1], extent):
                last = joined.pop()
                extent = last._replace(nbytes=last.nbytes + extent.nbytes)
            joined.append(extent)
    return tuple(joined)


def _follows(one: Extent, other: Extent) -> bool:
    return one.path == other.path and one.offset + one.nbytes == other.offset
