"""Bytes for a unit: one side of its segments, packed one after the other."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from pytest_subnet.checkpoints.dtypes import DTYPES
from pytest_subnet.scan.casts import cast

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from pytest_subnet.checkpoints import Checkpoint, Extent
    from pytest_subnet.checkpoints.base import Buffer
    from pytest_subnet.checkpoints.files import FileReader
    from pytest_subnet.scan.units import ScanUnit


_PAGE, _LINE = 4096, 64


def room_for(nbytes: int) -> NDArray[np.uint8]:
    """Memory from which `in_step` can take `nbytes`, whatever the offset."""
    return np.empty(nbytes + 2 * _PAGE, np.uint8)


def in_step(room: NDArray[np.uint8], offset: int, nbytes: int) -> NDArray[np.uint8]:
    """The part of `room` whose address lies in its page as `offset` does in the file's.

    A processor tells addresses apart by their place in a page first: where the target is a few
    bytes ahead of the source there, each load of a copy seems to wait for a store, and reading
    takes five times as long. Whole cache lines: the target is never ahead, and vectors are aligned.
    """
    start = (offset % _PAGE // _LINE * _LINE - room.ctypes.data) % _PAGE
    return room[start : start + nbytes]


class Sides:
    """Reads base and tuned of one unit after the other, each side into one reused buffer."""

    def __init__(
        self, reader: FileReader, base: Checkpoint | None, tuned: Checkpoint | None
    ) -> None:
        """Read files through `reader`, and units that have no extents from the checkpoints."""
        self._base = _Side(reader, base)
        self._tuned = _Side(reader, tuned)

    def load(self, unit: ScanUnit) -> tuple[Buffer, Buffer]:
        """Both sides of `unit` in the dtype in which it is compared; valid until the next call."""
        base = self._base.load(
            unit.base,
            [(segment.base_name, segment.start, segment.count) for segment in unit.segments],
            unit.base_dtype,
        )
        tuned = self._tuned.load(
            unit.tuned,
            [(segment.tuned_name, segment.start, segment.count) for segment in unit.segments],
            unit.tuned_dtype,
        )
        return (
            cast(base, unit.base_dtype, unit.dtype),
            cast(tuned, unit.tuned_dtype, unit.dtype),
        )


class _Side:
    def __init__(self, reader: FileReader, checkpoint: Checkpoint | None) -> None:
        self._reader = reader
        self._checkpoint = checkpoint
        self._room = room_for(0)

    def load(
        self, extents: Sequence[Extent] | None, runs: Sequence[tuple[str, int, int]], dtype: str
    ) -> Buffer:
        itemsize = DTYPES[dtype].itemsize
        ranges = [(name, start * itemsize, count * itemsize) for name, start, count in runs]
        if extents is not None:
            return self._from_files(extents)
        if self._checkpoint is None:
            raise RuntimeError("a unit without extents reached a worker that has no checkpoint")
        return self._from_memory(self._checkpoint, ranges)

    def _from_files(self, extents: Sequence[Extent]) -> NDArray[np.uint8]:
        nbytes = sum(extent.nbytes for extent in extents)
        if self._room.size < nbytes + 2 * _PAGE:
            self._room = room_for(nbytes)
        buffer = in_step(self._room, extents[0].offset if extents else 0, nbytes)
        memory = buffer.data
        done = 0
        for path, offset, length in extents:
            self._reader.read_into(path, offset, memory[done : done + length])
            done += length
        return buffer

    def _from_memory(
        self, checkpoint: Checkpoint, ranges: Sequence[tuple[str, int, int]]
    ) -> Buffer:
        pieces: list[Buffer] = []
        for name, start, nbytes in ranges:
            view = checkpoint.view(name)
            if view is None:
                piece = bytearray(nbytes)
                checkpoint.read_into(name, start, memoryview(piece))
                pieces.append(np.frombuffer(piece, np.uint8))
            else:
                pieces.append(view[start : start + nbytes])
        return pieces[0] if len(pieces) == 1 else _joined(pieces)


def _joined(pieces: Sequence[Buffer]) -> Buffer:
    arrays = [piece for piece in pieces if isinstance(piece, np.ndarray)]
    if len(arrays) == len(pieces):
        return np.concatenate(arrays)
    import torch

    tensors = [piece for piece in pieces if not isinstance(piece, np.ndarray)]
    device = next((t.device for t in tensors if t.device.type != "cpu"), tensors[0].device)
    return torch.cat([torch.as_tensor(_writable(piece)).to(device) for piece in pieces])


def _writable(piece: Buffer) -> Buffer:
    """Copied if it must not be written to: torch warns of such an array."""
    return np.require(piece, requirements="W") if isinstance(piece, np.ndarray) else piece
