"""Where the bits of a mask are kept, and how entries become bits.

Entry `i` of a tensor in row order is bit `i % 8` of byte `i // 8`. Each tensor's bits are padded
with zeros to whole words of 8 bytes, so that they can be counted a word at a time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

PIECE_BYTES = 1024 * 1024
"""How much of a mask is looked at at once."""


def packed_bytes(numel: int) -> int:
    """Bytes that the bits of `numel` entries take, padding included."""
    return -(-numel // 64) * 8


def pack(entries: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """The bits of `entries` in row order, padded."""
    packed = np.zeros(packed_bytes(entries.size), np.uint8)
    bits = np.packbits(entries.reshape(-1), bitorder="little")
    packed[: bits.size] = bits
    return packed


def unpack(packed: NDArray[np.uint8], numel: int) -> NDArray[np.bool_]:
    """The entries that `pack` packed, in one row."""
    return np.unpackbits(packed, count=numel, bitorder="little").view(np.bool_)


class BitStore(Protocol):
    """The packed bits of all tensors of a mask, one after the other."""

    @property
    def nbytes(self) -> int:
        """How many bytes there are."""
        ...

    def read(self, start: int, nbytes: int) -> NDArray[np.uint8]:
        """Bytes from `start` on, not to be written to; `CheckpointError` if they cannot be read."""
        ...


class MemoryBits:
    """Bits in memory."""

    def __init__(self, packed: NDArray[np.uint8]) -> None:
        """Take `packed`, uint8 `[bytes]`, as it is."""
        self._packed = packed

    @property
    def nbytes(self) -> int:
        """As `BitStore.nbytes`."""
        return self._packed.size

    def read(self, start: int, nbytes: int) -> NDArray[np.uint8]:
        """As `BitStore.read`."""
        return self._packed[start : start + nbytes]
