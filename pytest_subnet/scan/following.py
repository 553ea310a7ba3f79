"""One pass over all checkpoints of a run: each is read once, and what was counted is kept."""

from __future__ import annotations

import copy
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

import numpy as np

from pytest_subnet import progress
from pytest_subnet.checkpoints.dtypes import DTYPES
from pytest_subnet.checkpoints.files import FileReader
from pytest_subnet.scan import units as scan_units
from pytest_subnet.scan.casts import cast_array
from pytest_subnet.scan.engines import MadeThere
from pytest_subnet.scan.gathering import engine_of
from pytest_subnet.scan.kernels import choose_kernel
from pytest_subnet.scan.reading import in_step, room_for
from pytest_subnet.scan.remembering import UnitMemory
from pytest_subnet.scan.tolerance import DEFAULT_TOLERANCES, Tolerance
from pytest_subnet.scan.travelling import paths_of, to_travel

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from numpy.typing import NDArray

    from pytest_subnet.checkpoints import Checkpoint, Extent
    from pytest_subnet.checkpoints.base import Buffer
    from pytest_subnet.scan.contracts import Kernel, Work
    from pytest_subnet.scan.remembering import Integers, Part
    from pytest_subnet.scan.units import ScanUnit
    from pytest_subnet.trajectories import Trajectory

_Unit: TypeAlias = "tuple[ScanUnit, ...]"
"""The same entries in the first checkpoint and each of the others: a scan unit for each pair."""

_KEY = "following"


class Steps(NamedTuple):
    """Counts of one tensor, int64 `[steps]` each; step `t` leads to checkpoint `t` from `t - 1`.

    Attributes:
        updated: entries updated against the start.
        stepped: entries updated against the checkpoint before.
        ever: entries updated against the start in this checkpoint or an earlier one.
        outside: of `ever`, those that are not updated in the last checkpoint.
        moved: entries with other bits than in the checkpoint before, without the zeros that only
            changed their sign; the same under every tolerance.
        nonfinite: NaN and Inf, with the start: int64 `[steps + 1]`.
    """

    updated: Integers
    stepped: Integers
    ever: Integers
    outside: Integers
    moved: Integers
    nonfinite: Integers


class Diary:
    """All that has been counted of one trajectory, a row for each tensor of its first pair.

    Its arrays are replaced, never written to: a copy is what was known when it was made, whatever
    another thread counts meanwhile.

    Attributes:
        declared: tolerances to count in any pass, so that later questions need no further one.
    """

    def __init__(self, rows: int, steps: int) -> None:
        """Know nothing yet."""
        self.declared: tuple[Tolerance, ...] = DEFAULT_TOLERANCES
        self._entries: dict[Tolerance, Integers] = {}
        self._known: dict[Tolerance, NDArray[np.bool_]] = {}
        self._moved = np.zeros((rows, steps), np.int64)
        self._nonfinite = np.zeros((rows, steps + 1), np.int64)

    def missing(self, rows: Sequence[int], tolerance: Tolerance) -> list[int]:
        """Those of `rows` that have not been counted under `tolerance`."""
        known = self._known.get(tolerance)
        return [row for row in dict.fromkeys(rows) if known is None or not known[row]]

    def keep(
        self, rows: Sequence[int], tolerances: Sequence[Tolerance], parts: Sequence[Part]
    ) -> None:
        """Keep what a pass counted of `rows`, in parts: a tensor may be spread over several."""
        tensors, steps = self._moved.shape
        moved, nonfinite = self._moved.copy(), self._nonfinite.copy()
        entries, known = self._entries.copy(), self._known.copy()
        moved[rows] = nonfinite[rows] = 0
        for each in tolerances:
            entries[each] = np.array(entries.get(each, np.zeros((tensors, 4, steps), np.int64)))
            known[each] = np.array(known.get(each, np.zeros(tensors, np.bool_)))
            entries[each][rows], known[each][rows] = 0, True
        for part in parts:
            moved[part.rows] += part.moved
            nonfinite[part.rows] += part.nonfinite
            for number, each in enumerate(tolerances):
                entries[each][part.rows] += part.entries[:, number]
        self._moved, self._nonfinite = moved, nonfinite
        self._entries, self._known = entries, known

    def steps(self, rows: Sequence[int], tolerance: Tolerance) -> Steps:
        """What was counted of the tensors `rows` together."""
        index = list(rows)
        updated, stepped, ever, outside = self._entries[tolerance][index].sum(axis=0)
        moved, nonfinite = self._moved[index].sum(axis=0), self._nonfinite[index].sum(axis=0)
        return Steps(updated, stepped, ever, outside, moved, nonfinite)


def diary(trajectory: Trajectory) -> Diary:
    """What has been counted of `trajectory` so far."""
    with trajectory.lock:
        if _KEY not in trajectory.memory:
            rows = len(trajectory.pairs[0].tensors)
            trajectory.memory[_KEY] = Diary(rows, len(trajectory.pairs))
        known = trajectory.memory[_KEY]
    if not isinstance(known, Diary):
        raise TypeError(f"trajectory.memory[{_KEY!r}] is taken by {type(known).__name__}")
    return known


def declare(trajectory: Trajectory, tolerances: Sequence[Tolerance]) -> None:
    """Have every later pass over `trajectory` count under these tolerances too."""
    with trajectory.lock:
        known = diary(trajectory)
        known.declared = tuple(dict.fromkeys((*known.declared, *tolerances)))


def follow(trajectory: Trajectory, rows: Sequence[int], tolerance: Tolerance) -> Diary:
    """Make sure that the tensors `rows` of the first pair have been followed under `tolerance`.

    What was counted before is not read again, unless a checkpoint is live: as in `gather`. Two
    threads may ask at once: the second waits, and each has what held when it asked.

    Raises:
        CheckpointError: a checkpoint cannot be read, or changed since the trajectory was opened.
    """
    known = diary(trajectory)
    with trajectory.lock:
        _check_unchanged(trajectory)
        is_live = any(checkpoint.is_live for checkpoint in trajectory.checkpoints)
        missing = list(dict.fromkeys(rows)) if is_live else known.missing(rows, tolerance)
        if missing:
            for pair in trajectory.pairs:
                pair.check_second_names()
            tolerances = tuple(dict.fromkeys((*known.declared, tolerance)))
            parts = _read(trajectory, missing, tolerances)
            _check_unchanged(trajectory)
            known.keep(missing, tolerances, parts)
        return copy.copy(known)


def _check_unchanged(trajectory: Trajectory) -> None:
    for pair in trajectory.pairs:
        pair.check_unchanged()


def _read(
    trajectory: Trajectory, rows: Sequence[int], tolerances: tuple[Tolerance, ...]
) -> list[Part]:
    """Read the tensors `rows` of every checkpoint once; the parts add up to what is found."""
    units = _units(trajectory, rows)
    nbytes = [unit[0].count * sum(_itemsizes(unit)) for unit in units]
    work: Work[_Unit, Part]
    if trajectory.pairs[0].engine == "ray":
        units = [tuple(map(to_travel, trajectory.pairs, unit)) for unit in units]
        nowhere = (None,) * len(trajectory.checkpoints)
        work = MadeThere(partial(_follow_by, tolerances, nowhere))
    else:
        work = _follow_by(tolerances, trajectory.checkpoints)
    engine = engine_of(trajectory.pairs[0], _paths_of)
    parts = []
    with (
        progress.bar(sum(nbytes), "following") as advance,
        closing(engine.map(work, units)) as done,
    ):
        for position, part in done:
            parts.append(part)
            advance(nbytes[position])
    return parts


def _follow_by(
    tolerances: tuple[Tolerance, ...], checkpoints: tuple[Checkpoint | None, ...]
) -> _Follow:
    return _Follow(choose_kernel("cpu"), tolerances, checkpoints)


def _paths_of(unit: _Unit) -> set[str]:
    return set().union(*map(paths_of, unit))


def _units(trajectory: Trajectory, rows: Sequence[int]) -> list[_Unit]:
    """Every pair cut at the same places, by the widest dtype that a checkpoint stores there."""
    places = [
        {each.name: row for row, each in enumerate(pair.tensors)} for pair in trajectory.pairs
    ]
    names = [trajectory.pairs[0].tensors[row].name for row in rows]

    def dtypes_of(name: str) -> list[tuple[str, str, str]]:
        tensors = (
            pair.tensors[at[name]] for pair, at in zip(trajectory.pairs, places, strict=True)
        )
        return [(tensor.dtype, tensor.base_dtype, tensor.tuned_dtype) for tensor in tensors]

    units: list[_Unit] = []
    for dtypes, neighbours in groupby(names, dtypes_of):
        together = list(neighbours)
        widths = [max(DTYPES[dtype].itemsize for dtype in of_pair) for of_pair in dtypes]
        entries = scan_units.UNIT_BYTES // max(widths)
        cuts = [
            scan_units.cut(pair, [at[name] for name in together], entries * width)
            for pair, at, width in zip(trajectory.pairs, places, widths, strict=True)
        ]
        units += zip(*cuts, strict=True)
    return units


def _itemsizes(unit: _Unit) -> list[int]:
    """Bytes an entry in each checkpoint, as stored."""
    dtypes = [unit[0].base_dtype, *(side.tuned_dtype for side in unit)]
    return [DTYPES[dtype].itemsize for dtype in dtypes]


@dataclass(frozen=True)
class _Follow:
    """`Work` that reads the same entries of one checkpoint after the other.

    Attributes:
        kernel: as in `Compare`.
        tolerances: what to count beyond.
        checkpoints: where units without extents are read from; None where all have them.
    """

    kernel: Kernel
    tolerances: tuple[Tolerance, ...]
    checkpoints: tuple[Checkpoint | None, ...]

    @contextmanager
    def open(self) -> Iterator[Callable[[_Unit], Part]]:
        """As `Work.open`."""
        with FileReader() as reader:
            # The start stays; of the others, one and the one before it.
            start_room, *rooms = (_Room(reader) for _ in range(3))

            def compute(unit: _Unit) -> Part:
                first = unit[0]
                names = [segment.base_name for segment in first.segments]
                stored = _Stored(self.checkpoints[0], names, first.base, first.base_dtype)
                start = start_room.load(first, stored)
                memory = UnitMemory(start, unit[0], len(unit), self.kernel, self.tolerances)
                for step, (side, checkpoint) in enumerate(
                    zip(unit, self.checkpoints[1:], strict=True)
                ):
                    names = [segment.tuned_name for segment in side.segments]
                    stored = _Stored(checkpoint, names, side.tuned, side.tuned_dtype)
                    memory.take(rooms[step % 2].load(side, stored))
                return memory.part()

            yield compute


class _Stored(NamedTuple):
    """Where a unit's segments are in one checkpoint: names, bytes in files, dtype."""

    checkpoint: Checkpoint | None
    names: Sequence[str]
    extents: Sequence[Extent] | None
    dtype: str


class _Room:
    """Memory for the bytes of one unit in one checkpoint, used again for the next."""

    def __init__(self, reader: FileReader) -> None:
        self._reader = reader
        self._memory, self._nbytes = room_for(0), 0

    def load(self, unit: ScanUnit, stored: _Stored) -> NDArray[np.uint8]:
        """The packed bytes of the unit's segments, in the dtype in which they are compared."""
        packed = self._packed(unit, stored)
        if stored.dtype == unit.dtype:
            return packed
        return cast_array(packed, stored.dtype, unit.dtype)

    def _packed(self, unit: ScanUnit, stored: _Stored) -> NDArray[np.uint8]:
        """The same as they are stored."""
        checkpoint, names, extents, dtype = stored
        itemsize = DTYPES[dtype].itemsize
        nbytes = unit.count * itemsize
        if self._nbytes < nbytes:
            self._memory, self._nbytes = room_for(nbytes), nbytes
        buffer = in_step(self._memory, extents[0].offset if extents else 0, nbytes)
        done = 0
        if extents is not None:
            for path, offset, length in extents:
                self._reader.read_into(path, offset, buffer.data[done : done + length])
                done += length
            return buffer
        if checkpoint is None:
            raise RuntimeError("a unit without extents reached a worker that has no checkpoint")
        for segment, name in zip(unit.segments, names, strict=True):
            start, length = segment.start * itemsize, segment.count * itemsize
            view = checkpoint.view(name)
            if view is None:
                checkpoint.read_into(name, start, buffer.data[done : done + length])
            else:
                buffer[done : done + length] = _on_cpu(view[start : start + length])
            done += length
        return buffer


def _on_cpu(part: Buffer) -> NDArray[np.uint8]:
    return part if isinstance(part, np.ndarray) else part.cpu().numpy()
