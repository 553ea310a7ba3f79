"""What has been counted of a pair, and counting what has not: nothing is read twice."""

from __future__ import annotations

from contextlib import closing
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from pytest_subnet import progress
from pytest_subnet.scan.counters import FIRST_TOLERANCE, Counters
from pytest_subnet.scan.device_pipeline import IN_PLACE_BYTES, comparing, gpu_of
from pytest_subnet.scan.engines import ThreadEngine
from pytest_subnet.scan.kernels import choose_kernel
from pytest_subnet.scan.tolerance import DEFAULT_TOLERANCES, Tolerance
from pytest_subnet.scan.units import cut

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from pytest_subnet.checkpoints import Checkpoint
    from pytest_subnet.pairs import ModelPair
    from pytest_subnet.scan.contracts import Work
    from pytest_subnet.scan.units import ScanUnit

ResultT = TypeVar("ResultT")
KeptT = TypeVar("KeptT")

_KEY = "scan"


class Ledger:
    """All that has been counted of one pair, a row for each of its tensors.

    Attributes:
        declared: tolerances to count in any scan, so that later questions need no further one.
    """

    def __init__(self, pair: ModelPair) -> None:
        """Know nothing yet."""
        self.declared: tuple[Tolerance, ...] = DEFAULT_TOLERANCES
        rows = len(pair.tensors)
        self._counters = Counters(rows, ())
        self._scanned = np.zeros(rows, bool)
        self._beyond: dict[Tolerance, NDArray[np.int64]] = {}

    def missing(self, rows: NDArray[np.intp], tolerance: Tolerance) -> NDArray[np.intp]:
        """Those of `rows` that have not been counted under `tolerance`."""
        if tolerance.same_bits:
            return rows[~self._scanned[rows]]
        beyond = self._beyond.get(tolerance)
        return rows if beyond is None else rows[beyond[rows] < 0]

    def keep(self, rows: NDArray[np.intp], counted: Counters) -> None:
        """Keep what a scan counted of `rows`."""
        self._counters.integers[rows] = counted.integers[rows, :FIRST_TOLERANCE]
        self._counters.sums[rows] = counted.sums[rows]
        self._counters.peaks[rows] = counted.peaks[rows]
        self._scanned[rows] = True
        for k, tolerance in enumerate(counted.tolerances):
            unknown = np.full(len(self._scanned), -1, np.int64)
            self._beyond.setdefault(tolerance, unknown)[rows] = counted.integers[
                rows, FIRST_TOLERANCE + k
            ]

    @property
    def scanned(self) -> NDArray[np.intp]:
        """The rows that have been read."""
        return np.flatnonzero(self._scanned)

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


def ledger(pair: ModelPair) -> Ledger:
    """What has been counted of `pair` so far."""
    with pair.lock:
        if _KEY not in pair.memory:
            pair.memory[_KEY] = Ledger(pair)
        known = pair.memory[_KEY]
    if not isinstance(known, Ledger):
        raise TypeError(f"pair.memory[{_KEY!r}] is taken by {type(known).__name__}")
    return known


def declare(pair: ModelPair, tolerances: Sequence[Tolerance]) -> None:
    """Have every later scan of `pair` count beyond these tolerances too."""
    with pair.lock:
        known = ledger(pair)
        known.declared = tuple(dict.fromkeys((*known.declared, *tolerances)))


def gather(pair: ModelPair, rows: Sequence[int], tolerance: Tolerance) -> Ledger:
    """Make sure that the tensors `rows` of `pair` have been counted under `tolerance`.

    What was counted before is not read again, unless a side is live: torch does not tell of every
    write to a tensor, and what it does not tell of must not leave an old verdict. Two threads may
    ask at once: the second waits and finds the work done.

    Raises:
        CheckpointError: a side cannot be read, or changed since the pair was opened.
    """
    wanted = np.unique(np.asarray(rows, np.intp))
    known = ledger(pair)
    with pair.lock:
        pair.check_unchanged()
        is_live = pair.base.is_live or pair.tuned.is_live
        missing = wanted if is_live else known.missing(wanted, tolerance)
        if missing.size:
            pair.check_second_names()
            tolerances = dict.fromkeys((*known.declared, tolerance))
            counted = scan(pair, missing.tolist(), [t for t in tolerances if not t.same_bits])
            pair.check_unchanged()
            known.keep(missing, counted)
    return known


def scan(pair: ModelPair, rows: Sequence[int], tolerances: Sequence[Tolerance]) -> Counters:
    """Read the tensors `rows` of `pair` once and count.

    Returns:
        Counters with a row for every tensor of the pair; rows not asked for are zero.
    """
    gpu = gpu_of(pair)
    units = cut(pair, rows, IN_PLACE_BYTES if gpu else None)
    base, tuned = sources(pair, units)
    kernel = choose_kernel(pair.device)
    work = comparing(kernel, tuple(tolerances), base, tuned, gpu or pair.device)
    return total(pair, units, results_of(work, units, lambda _, counted: counted), tolerances)


def sources(
    pair: ModelPair, units: Sequence[ScanUnit]
) -> tuple[Checkpoint | None, Checkpoint | None]:
    """What workers need besides the units: nothing where all bytes are in files."""
    in_files = all(unit.base is not None and unit.tuned is not None for unit in units)
    return (None, None) if in_files else (pair.base, pair.tuned)


def total(
    pair: ModelPair,
    units: Sequence[ScanUnit],
    parts: Sequence[Counters],
    tolerances: Sequence[Tolerance],
) -> Counters:
    """Counters with a row for every tensor of `pair`, from those of `units`."""
    everything = Counters(len(pair.tensors), tolerances)
    for unit, part in zip(units, parts, strict=True):
        everything.add(np.array([segment.row for segment in unit.segments], np.intp), part)
    return everything


def results_of(
    work: Work[ScanUnit, ResultT],
    units: Sequence[ScanUnit],
    settle: Callable[[ScanUnit, ResultT], KeptT],
) -> list[KeptT]:
    """What is kept of each unit's result, in the order of the units.

    So sums do not depend on who was quicker. `settle` is called with each result as it comes, in
    this thread, and gives what to keep of it.
    """
    kept: dict[int, KeptT] = {}
    nbytes = sum(unit.nbytes for unit in units)
    engine = ThreadEngine()
    with progress.bar(nbytes, "comparing") as advance, closing(engine.map(work, units)) as done:
        for position, result in done:
            if position in kept:
                raise RuntimeError(f"unit {position} came back twice")
            kept[position] = settle(units[position], result)
            advance(units[position].nbytes)
    if len(kept) != len(units):
        raise RuntimeError(f"{len(units) - len(kept)} of {len(units)} units did not come back")
    return [kept[position] for position in range(len(units))]
