"""The work of a scan: read both sides of a unit and run the kernel over them."""

from __future__ import annotations

import os
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from pytest_subnet.checkpoints.base import Extent
from pytest_subnet.checkpoints.dtypes import ARITHMETIC, DTYPES
from pytest_subnet.checkpoints.files import FileReader
from pytest_subnet.checkpoints.remote.urls import is_url
from pytest_subnet.scan import bits_kernel
from pytest_subnet.scan.contracts import FileKernel, FileRun, Place
from pytest_subnet.scan.counters import Counters
from pytest_subnet.scan.kernels import device_bits_kernel, device_kernel
from pytest_subnet.scan.reading import Sides, in_step, room_for

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from numpy.typing import NDArray

    from pytest_subnet.checkpoints import Checkpoint
    from pytest_subnet.checkpoints.base import Buffer
    from pytest_subnet.scan.contracts import Kernel
    from pytest_subnet.scan.tolerance import Tolerance
    from pytest_subnet.scan.units import ScanUnit

_HAS_PREAD = hasattr(os, "pread")  # Windows has none, and compiled code would call it by name

_SCRATCH_BYTES = 256 * 1024
"""A side's share of the cache: two of these fit, or nearly, the second level of a processor."""


@dataclass(frozen=True)
class Compare:
    """`Work` that counts what differs in a unit.

    Attributes:
        kernel: for the dtypes with arithmetic; the others are compared by bits.
        tolerances: what to count beyond, without same bits.
        base: where units without extents are read from; None when all of them have extents.
        tuned: likewise.
        device: where to compare what is on a device; None compares it there.
    """

    kernel: Kernel
    tolerances: tuple[Tolerance, ...]
    base: Checkpoint | None
    tuned: Checkpoint | None
    device: str | None = None

    @contextmanager
    def open(self) -> Iterator[Callable[[ScanUnit], Counters]]:
        """As `Work.open`."""
        with FileReader() as reader:
            sides = Sides(reader, self.base, self.tuned)
            rooms = scratch_rooms()

            def compare(unit: ScanUnit) -> Counters:
                counters = Counters(len(unit.segments), self.tolerances)
                bounds = bounds_of(unit)
                if self._compare_files(unit, reader, rooms, bounds, counters):
                    return counters
                # Also reached where a read came back short: this says which file ended, and where.
                base, tuned = sides.load(unit)
                kernel = self._kernel_for(unit.dtype, base, tuned)
                kernel(base, tuned, unit.dtype, bounds, counters)
                return counters

            yield compare

    def _kernel_for(self, dtype: str, base: Buffer, tuned: Buffer) -> Kernel:
        if isinstance(base, np.ndarray) and isinstance(tuned, np.ndarray):
            return self.kernel if dtype in ARITHMETIC else bits_kernel.compare
        return (device_kernel if dtype in ARITHMETIC else device_bits_kernel)(self.device)

    def _compare_files(
        self,
        unit: ScanUnit,
        reader: FileReader,
        rooms: tuple[NDArray[np.uint8], NDArray[np.uint8]],
        bounds: NDArray[np.int64],
        counters: Counters,
    ) -> bool:
        """The quick way, for a unit that is in files as it is compared."""
        if not isinstance(self.kernel, FileKernel) or not is_read_by_kernel(unit):
            return False
        runs = runs_of_files(unit, reader, rooms)
        return self.kernel.compare_files(runs, unit.dtype, bounds, counters)


def bounds_of(unit: ScanUnit) -> NDArray[np.int64]:
    """Where the segments of `unit` start and end, as a kernel takes it."""
    bounds = np.zeros(len(unit.segments) + 1, np.int64)
    np.cumsum([segment.count for segment in unit.segments], out=bounds[1:])
    return bounds


def scratch_rooms() -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """A worker's buffers for base and tuned."""
    return room_for(_SCRATCH_BYTES), room_for(_SCRATCH_BYTES)


def is_read_by_kernel(unit: ScanUnit) -> bool:
    """Whether both sides of `unit` are in files of this machine, and compared as they are."""
    return (
        _HAS_PREAD
        and unit.dtype in ARITHMETIC
        and unit.dtype == unit.base_dtype == unit.tuned_dtype
        and unit.base is not None
        and unit.tuned is not None
        and not any(is_url(extent.path) for extent in (*unit.base, *unit.tuned))
    )


def runs_of_files(
    unit: ScanUnit, reader: FileReader, rooms: tuple[NDArray[np.uint8], NDArray[np.uint8]]
) -> Iterator[FileRun]:
    """What a kernel is to read of a unit, one run of one file on each side after the other."""
    assert unit.base is not None
    assert unit.tuned is not None
    itemsize = DTYPES[unit.dtype].itemsize
    for base, tuned in _side_by_side(unit.base, unit.tuned):
        before = Place(reader.descriptor(base.path), base.offset)
        after = Place(reader.descriptor(tuned.path), tuned.offset)
        scratch = (
            in_step(rooms[0], base.offset, _SCRATCH_BYTES),
            in_step(rooms[1], tuned.offset, _SCRATCH_BYTES),
        )
        yield FileRun(before, after, scratch, base.nbytes // itemsize)


def _side_by_side(
    base: Sequence[Extent], tuned: Sequence[Extent]
) -> Iterator[tuple[Extent, Extent]]:
    """Extents of the same bytes, cut where one side or the other goes on elsewhere."""
    left, right = list(reversed(base)), list(reversed(tuned))
    while left and right:
        one, other = left.pop(), right.pop()
        nbytes = min(one.nbytes, other.nbytes)
        yield one._replace(nbytes=nbytes), other._replace(nbytes=nbytes)
        for side, extent in ((left, one), (right, other)):
            if extent.nbytes > nbytes:
                side.append(Extent(extent.path, extent.offset + nbytes, extent.nbytes - nbytes))
