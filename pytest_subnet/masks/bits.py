"""Where the bits of a mask are kept, and how entries become bits.

Entry `i` of a tensor in row order is bit `i % 8` of byte `i // 8`. Each tensor's bits are padded
with zeros to whole words of 8 bytes, so that they can be counted a word at a time.
"""

from __future__ import annotations

import tempfile
import threading
import weakref
from typing import TYPE_CHECKING, Protocol

import numpy as np

from pytest_subnet.errors import CheckpointError
from pytest_subnet.text import safe, size

if TYPE_CHECKING:
    from numpy.typing import NDArray

PIECE_BYTES = 1024 * 1024
"""How much of a mask is looked at at once."""

_LARGEST_IN_MEMORY = 64 * 1024 * 1024
"""Above, bits are kept in a temporary file: the mask of a model of 8 B entries takes 1 GB."""


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


def popcount(words: NDArray[np.uint64]) -> int:
    """How many bits are set."""
    # The narrower sum takes half the time; a piece of a mask is far from wrapping it.
    wide = np.uint32 if words.size < 1 << 26 else np.uint64
    return int(np.bitwise_count(words).sum(dtype=wide))


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

    def write(self, start: int, packed: NDArray[np.uint8]) -> None:
        """Put bytes in place from `start` on; by whoever makes the mask, before anyone reads."""
        self._packed[start : start + packed.size] = packed


class TemporaryBits:
    """Bits in a file that has no name and goes away with the mask."""

    def __init__(self, nbytes: int) -> None:
        """`nbytes` zero bytes, in the system's directory for temporary files."""
        self.nbytes = nbytes
        self._lock = threading.Lock()  # seek and read belong together
        try:
            self._file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115
            weakref.finalize(self, self._file.close)
            self._file.truncate(nbytes)
        except OSError as error:
            raise self._no_room(error) from error

    def write(self, start: int, packed: NDArray[np.uint8]) -> None:
        """As `MemoryBits.write`."""
        rest = np.ascontiguousarray(packed).data
        try:
            with self._lock:
                self._file.seek(start)
                while rest:
                    rest = rest[self._file.write(rest) :]
        except OSError as error:
            raise self._no_room(error) from error

    def read(self, start: int, nbytes: int) -> NDArray[np.uint8]:
        """As `BitStore.read`."""
        packed = np.empty(nbytes, np.uint8)
        rest = packed.data
        try:
            with self._lock:
                self._file.seek(start)
                while rest:
                    got = self._file.readinto(rest)
                    if not got:
                        raise OSError("it ends early")
                    rest = rest[got:]
        except OSError as error:
            raise CheckpointError(
                f"cannot read a mask back from {safe(tempfile.gettempdir())}: "
                f"{error.strerror or error}; check the disk and make the mask again"
            ) from error
        return packed

    def _no_room(self, error: OSError) -> CheckpointError:
        return CheckpointError(
            f"cannot keep {size(self.nbytes)} of a mask in {safe(tempfile.gettempdir())}: "
            f"{error.strerror or error}; free the space, or name another directory in TMPDIR"
        )


def room_for_bits(nbytes: int) -> MemoryBits | TemporaryBits:
    """Room for `nbytes` of bits, all zero: in memory, or on disk where they are many."""
    if nbytes <= _LARGEST_IN_MEMORY:
        return MemoryBits(np.zeros(nbytes, np.uint8))
    return TemporaryBits(nbytes)
