"""Which entries are updated, found in the pass that counts them."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from pytest_subnet.checkpoints.dtypes import ARITHMETIC, DTYPES
from pytest_subnet.checkpoints.files import FileReader
from pytest_subnet.scan import bits_kernel
from pytest_subnet.scan.casts import cast
from pytest_subnet.scan.comparing import (
    bounds_of,
    is_read_by_kernel,
    runs_of_files,
    scratch_rooms,
)
from pytest_subnet.scan.contracts import FileKernel, FileMaskKernel
from pytest_subnet.scan.counters import Counters
from pytest_subnet.scan.device_pipeline import (
    Lane,
    gpu_of,
    indexed,
    is_gpu,
    lane_on,
    piece_bytes,
)
from pytest_subnet.scan.engines import MadeThere
from pytest_subnet.scan.found import STRATA, Found, StrataCounts, merged, rounded_to
from pytest_subnet.scan.gathering import ledger, results_of, sources, total
from pytest_subnet.scan.kernels import choose_kernel, device_mask_kernel
from pytest_subnet.scan.reading import Sides
from pytest_subnet.scan.tolerance import SAME_BITS
from pytest_subnet.scan.travelling import device_there, to_travel
from pytest_subnet.scan.units import cut

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from numpy.typing import NDArray

    from pytest_subnet.checkpoints import Checkpoint
    from pytest_subnet.checkpoints.base import Buffer
    from pytest_subnet.pairs import ModelPair
    from pytest_subnet.scan.contracts import MaskKernel, Work
    from pytest_subnet.scan.gathering import Ledger
    from pytest_subnet.scan.tolerance import Tolerance
    from pytest_subnet.scan.units import ScanUnit


class Marks(NamedTuple):
    """What comes back of one unit.

    Attributes:
        counters: a row a segment.
        words: the bits of each segment, uint64, padded.
        strata: of the tensors it touches.
    """

    counters: Counters
    words: tuple[NDArray[np.uint64], ...]
    strata: StrataCounts


class Kept(NamedTuple):
    """What is kept of it once its bits are written down."""

    counters: Counters
    strata: StrataCounts


class Marked(NamedTuple):
    """What is known of the tensors asked for.

    Attributes:
        entries: int64 `[rows]`: how many entries of each are updated.
        strata: counts of those of 16-bit floats, by row of the pair.
    """

    entries: NDArray[np.int64]
    strata: StrataCounts


def mark(
    pair: ModelPair,
    rows: Sequence[int],
    tolerance: Tolerance,
    write: Callable[[int, int, NDArray[np.uint64]], None],
) -> Marked:
    """Read the tensors `rows` of `pair` once, and find out which entries are updated.

    All counters are gathered too, so that what was not scanned before needs no scan after.

    Args:
        pair: what to compare.
        rows: of `pair.tensors`.
        tolerance: under which entries count as updated.
        write: takes the row, the first of its words and the words; called in this thread.

    Raises:
        CheckpointError: a side cannot be read, or changed since the pair was opened.
    """
    index = np.asarray(rows, np.intp)
    known = ledger(pair)
    with pair.lock:
        pair.check_unchanged()
        pair.check_second_names()
        tolerances = [t for t in dict.fromkeys((*known.declared, tolerance)) if not t.same_bits]
        is_brought = is_gpu(pair.device) and gpu_of(pair) is None
        units = cut(pair, rows, piece_bytes() if is_brought else None)
        work: Work[ScanUnit, Marks]
        if pair.engine == "ray":
            units = [to_travel(pair, unit) for unit in units]
            device = device_there(pair.device)
            work = MadeThere(partial(_mark_files, tuple(tolerances), tolerance, device))
        else:
            work = CompareAndMark(
                choose_mask_kernel(pair.device),
                tuple(tolerances),
                tolerance,
                *sources(pair, units),
                None if pair.device is None else indexed(pair.device),
            )

        def settle(unit: ScanUnit, marks: Marks) -> Kept:
            for segment, words in zip(unit.segments, marks.words, strict=True):
                write(segment.row, segment.start // 64, words)
            return Kept(marks.counters, marks.strata)

        kept = results_of(pair, work, units, settle)
        counted = total(pair, units, [each.counters for each in kept], tolerances)
        known.read += index.size
        pair.check_unchanged()
        is_live = pair.base.is_live or pair.tuned.is_live
        missing = index if is_live else _missing(known, index, (SAME_BITS, *tolerances))
        if missing.size:
            with known.cache.turn():
                known.learn(missing, counted)
        return Marked(known.updated(tolerance)[index], merged([each.strata for each in kept]))


def _mark_files(
    tolerances: tuple[Tolerance, ...], tolerance: Tolerance, device: str | None
) -> CompareAndMark:
    """The work of marking what is in files alone, made where it is done."""
    return CompareAndMark(choose_mask_kernel(device), tolerances, tolerance, None, None, device)


def _missing(
    known: Ledger, rows: NDArray[np.intp], tolerances: Sequence[Tolerance]
) -> NDArray[np.intp]:
    """Those of `rows` that have not been counted under all of `tolerances`."""
    parts = [known.missing(rows, tolerance) for tolerance in tolerances]
    return np.unique(np.concatenate(parts))


@dataclass(frozen=True)
class CompareAndMark:
    """`Work` that counts what differs in a unit and marks which entries do.

    Attributes:
        kernel: for the dtypes with arithmetic; the others are compared by bits.
        tolerances: what to count beyond, without same bits.
        tolerance: what to mark beyond.
        base: as in `Compare`.
        tuned: as in `Compare`.
        device: as in `Compare`.
    """

    kernel: MaskKernel
    tolerances: tuple[Tolerance, ...]
    tolerance: Tolerance
    base: Checkpoint | None
    tuned: Checkpoint | None
    device: str | None = None

    @contextmanager
    def open(self) -> Iterator[Callable[[ScanUnit], Marks]]:
        """As `Work.open`."""
        with FileReader() as reader:
            sides = Sides(reader, self.base, self.tuned)
            rooms = scratch_rooms()
            lanes: list[Lane] = []

            def compare(unit: ScanUnit) -> Marks:
                counters = Counters(len(unit.segments), self.tolerances)
                bounds = bounds_of(unit)
                found = Found(bounds, unit.dtype, self.tolerance)
                if not (
                    self._mask_files(unit, reader, rooms, bounds, counters, found)
                    or self._mark_on_gpu(unit, reader, lanes, counters, found)
                ):
                    base, tuned = sides.load(unit)
                    kernel = self._kernel_for(unit.dtype, base, tuned)
                    kernel(base, tuned, unit.dtype, bounds, counters, found)
                    if stored_on_grid(unit.dtype, unit.base_dtype, unit.tuned_dtype):
                        _count_stored(unit, base, bounds, found)
                return _marks(unit, counters, found)

            yield compare

    def _mask_files(
        self,
        unit: ScanUnit,
        reader: FileReader,
        rooms: tuple[NDArray[np.uint8], NDArray[np.uint8]],
        bounds: NDArray[np.int64],
        counters: Counters,
        found: Found,
    ) -> bool:
        """The quick way, for a unit that is one run of one file on each side.

        Where it is several, one could end in the middle of a word of bits.
        """
        if not isinstance(self.kernel, FileMaskKernel) or not is_read_by_kernel(unit):
            return False
        assert unit.base is not None
        assert unit.tuned is not None
        if not len(unit.base) == len(unit.tuned) == 1:
            return False
        run = next(runs_of_files(unit, reader, rooms))
        places = run.base, run.tuned, run.scratch
        return self.kernel.mask_files(*places, unit.dtype, bounds, counters, found)

    def _mark_on_gpu(
        self,
        unit: ScanUnit,
        reader: FileReader,
        lanes: list[Lane],
        counters: Counters,
        found: Found,
    ) -> bool:
        """The quick way to a GPU, for a unit that is in files as it is compared."""
        as_stored = unit.dtype == unit.base_dtype == unit.tuned_dtype
        if not is_gpu(self.device) or not as_stored or unit.dtype not in ARITHMETIC:
            return False
        if unit.base is None or unit.tuned is None:
            return False
        if not lanes:
            assert self.device is not None
            lanes.append(lane_on(self.device))
        return lanes[0].mark(unit, reader, self.kernel, counters, found)

    def _kernel_for(self, dtype: str, base: Buffer, tuned: Buffer) -> MaskKernel:
        if dtype not in ARITHMETIC:
            return mark_bits
        if isinstance(base, np.ndarray) and isinstance(tuned, np.ndarray):
            return self.kernel
        return device_mask_kernel(self.device)


def stored_on_grid(dtype: str, base_dtype: str, tuned_dtype: str) -> bool:
    """Whether 16-bit floats, with the base's on the grid of the tuned, are compared as wider ones.

    Which strata there are is then up to the words that the base stores.
    """
    return dtype not in STRATA and rounded_to(dtype, tuned_dtype) == base_dtype


def _count_stored(unit: ScanUnit, base: Buffer, bounds: NDArray[np.int64], found: Found) -> None:
    """Count the strata of a base that was widened: casting it back gives the words it stores."""
    words = cast(base, unit.dtype, unit.base_dtype)
    stored = (words if isinstance(words, np.ndarray) else words.cpu().numpy()).view(np.uint16)
    found.count_as(unit.base_dtype)
    for row, count in enumerate(np.diff(bounds).tolist()):
        bits = found.words[found.starts[row] : found.starts[row + 1]].view(np.uint8)
        flags = np.unpackbits(bits, count=count, bitorder="little").view(np.bool_)
        found.count(row, stored[bounds[row] : bounds[row + 1]], flags)


def _marks(unit: ScanUnit, counters: Counters, found: Found) -> Marks:
    rows = np.array([segment.row for segment in unit.segments], np.int64)
    words = np.split(found.words, found.starts[1:-1])
    return Marks(counters, tuple(words), StrataCounts.of(found, rows))


def choose_mask_kernel(device: str | None) -> MaskKernel:
    """The fastest mask kernel for buffers on `device`; None is the CPU."""
    if isinstance(choose_kernel(device), FileKernel):
        from pytest_subnet.scan.mask_kernel import NumbaMaskKernel

        return NumbaMaskKernel()
    return device_mask_kernel(device or "cpu")


def mark_bits(
    base: Buffer,
    tuned: Buffer,
    dtype: str,
    bounds: NDArray[np.int64],
    counters: Counters,
    found: Found,
) -> None:
    """A `MaskKernel` for every dtype; no tolerance applies."""
    bits_kernel.compare(base, tuned, dtype, bounds, counters)
    left, right = (
        side if isinstance(side, np.ndarray) else side.cpu().numpy() for side in (base, tuned)
    )
    differs = (left != right).reshape(-1, DTYPES[dtype].itemsize).any(axis=1)
    for row in range(bounds.size - 1):
        found.mark(row, differs[bounds[row] : bounds[row + 1]])
