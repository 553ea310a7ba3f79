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
        self._buffer = np.empty(0, np.uint8)

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
        buffer = self._room(sum(extent.nbytes for extent in extents))
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

    def _room(self, nbytes: int) -> NDArray[np.uint8]:
        if self._buffer.size < nbytes:
            self._buffer = np.empty(nbytes, np.uint8)
        return self._buffer[:nbytes]


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
