"""What has been counted of a pair, and counting what has not: nothing is read twice."""

from __future__ import annotations

from contextlib import closing
from functools import partial
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from pytest_subnet import progress
from pytest_subnet.scan.cache import NoCache, ScanCache, cache_of
from pytest_subnet.scan.counters import Counters
from pytest_subnet.scan.device_pipeline import (
    IN_PLACE_BYTES,
    comparing,
    gpu_of,
    wait_for_caller,
)
from pytest_subnet.scan.engines import MadeThere, ThreadEngine
from pytest_subnet.scan.kernels import choose_kernel
from pytest_subnet.scan.pooling import is_spread, scan_together
from pytest_subnet.scan.tally import Tally
from pytest_subnet.scan.tolerance import DEFAULT_TOLERANCES, Tolerance
from pytest_subnet.scan.travelling import device_there, paths_of, to_travel
from pytest_subnet.scan.units import cut

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from pytest_subnet.checkpoints import Checkpoint
    from pytest_subnet.pairs import ModelPair
    from pytest_subnet.scan.contracts import Engine, Work
    from pytest_subnet.scan.units import ScanUnit

UnitT = TypeVar("UnitT")
ResultT = TypeVar("ResultT")
KeptT = TypeVar("KeptT")

_KEY = "scan"


class Ledger(Tally):
    """All that is known of one pair in this process.

    Attributes:
        declared: tolerances to count in any scan, so that later questions need no further one.
        cache: where it is kept for other processes.
        read: how many tensors were read, each as often as it was.
        taken: how many tensors were not, because the cache had their counts.
    """

    def __init__(self, pair: ModelPair) -> None:
        """Know nothing yet."""
        super().__init__(len(pair.tensors))
        self.declared: tuple[Tolerance, ...] = DEFAULT_TOLERANCES
        self.cache: ScanCache | NoCache = NoCache()
        self.read = self.taken = 0

    def recall(self, rows: NDArray[np.intp], tolerances: Sequence[Tolerance]) -> NDArray[np.intp]:
        """Take of `rows` what the cache has under all of `tolerances`; gives those it has not."""
        found, counted = self.cache.recall(rows, tolerances)
        self.keep(found, counted)
        self.taken += found.size
        return np.setdiff1d(rows, found)

    def learn(self, rows: NDArray[np.intp], counted: Counters) -> None:
        """Keep what a scan counted of `rows`, for other processes too."""
        self.keep(rows, counted)
        self.cache.remember(rows, counted)


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


def remember_in(pair: ModelPair, directory: Path) -> None:
    """Keep what is counted of `pair` in `directory`, and read nothing that is kept there.

    Of pairs of files only: what is in memory means nothing to another process.
    """
    with pair.lock:
        ledger(pair).cache = cache_of(pair, directory)


def gather(pair: ModelPair, rows: Sequence[int], tolerance: Tolerance) -> Ledger:
    """Make sure that the tensors `rows` of `pair` have been counted under `tolerance`.

    What was counted before is not read again, unless a side is live: torch does not tell of every
    write to a tensor, and what it does not tell of must not leave an old verdict. Two threads may
    ask at once, or two processes that share a cache: the second waits and finds the work done.

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
            tolerances = [t for t in dict.fromkeys((*known.declared, tolerance)) if not t.same_bits]
            missing = known.recall(missing, tolerances)
            if missing.size:
                _count(pair, known, missing, tolerances)
    return known


def _count(
    pair: ModelPair, known: Ledger, rows: NDArray[np.intp], tolerances: Sequence[Tolerance]
) -> None:
    """Read `rows` of `pair`, or have what another process counts of them just now."""
    with known.cache.turn():
        missing = known.recall(rows, tolerances)
        if missing.size:
            pair.check_second_names()
            counted = scan(pair, missing.tolist(), tolerances)
            known.read += missing.size
        pair.check_unchanged()
        if missing.size:
            known.learn(missing, counted)


def scan(pair: ModelPair, rows: Sequence[int], tolerances: Sequence[Tolerance]) -> Counters:
    """Read the tensors `rows` of `pair` once and count.

    Returns:
        Counters with a row for every tensor of the pair; rows not asked for are zero.
    """
    if is_spread(pair):
        return scan_together(pair, rows, tolerances, scan)
    gpu = gpu_of(pair)
    units = cut(pair, rows, IN_PLACE_BYTES if gpu else None)
    work: Work[ScanUnit, Counters]
    if pair.engine == "ray":
        units = [to_travel(pair, unit) for unit in units]
        work = MadeThere(partial(_compare_files, tuple(tolerances), device_there(pair.device)))
    else:
        base, tuned = sources(pair, units)
        kernel = choose_kernel(pair.device)
        work = comparing(kernel, tuple(tolerances), base, tuned, gpu or pair.device)
    parts = results_of(pair, work, units, lambda _, counted: counted)
    return total(pair, units, parts, tolerances)


def _compare_files(
    tolerances: tuple[Tolerance, ...], device: str | None
) -> Work[ScanUnit, Counters]:
    """The work of a scan of files alone, made where it is done."""
    return comparing(choose_kernel(device), tolerances, None, None, device)


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


def engine_of(pair: ModelPair, paths: Callable[[UnitT], set[str]]) -> Engine:
    """Who does the work on `pair`; for workers elsewhere, with the files that each unit needs."""
    if pair.engine != "ray":
        wait_for_caller(pair)
        return ThreadEngine()
    from pytest_subnet.scan.ray_engine import RayEngine

    return RayEngine(paths, gpus=device_there(pair.device) == "cuda")


def results_of(
    pair: ModelPair,
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
    engine = engine_of(pair, paths_of)
    with progress.bar(nbytes, "comparing") as advance, closing(engine.map(work, units)) as done:
        for position, result in done:
            if position in kept:
                raise RuntimeError(f"unit {position} came back twice")
            kept[position] = settle(units[position], result)
            advance(units[position].nbytes)
    if len(kept) != len(units):
        raise RuntimeError(f"{len(units) - len(kept)} of {len(units)} units did not come back")
    return [kept[position] for position in range(len(units))]
