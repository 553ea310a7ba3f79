"""What a checkpoint is: a read-only mapping from name to tensor, read piece by piece."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, NamedTuple

from pytest_subnet.checkpoints.dtypes import DTYPES
from pytest_subnet.errors import CheckpointError
from pytest_subnet.text import nearest, safe

if TYPE_CHECKING:
    from collections.abc import Hashable, Mapping, Sequence
    from pathlib import Path
    from typing import TypeAlias

    import numpy as np
    import torch

    Buffer: TypeAlias = "np.ndarray[tuple[int], np.dtype[np.uint8]] | torch.Tensor"
    """Raw bytes in one row: a numpy array on the CPU, a uint8 tensor on a device."""

_HASH_PIECE = 8 * 1024 * 1024


class TensorInfo(NamedTuple):
    """What a header says of a tensor: strings and numbers, nothing that needs torch."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    nbytes: int

    @property
    def numel(self) -> int:
        """Number of entries."""
        return math.prod(self.shape)


class Extent(NamedTuple):
    """A run of bytes in a file."""

    path: str
    offset: int
    nbytes: int


class Checkpoint(ABC):
    """The weights of one model, wherever they lie; opening one reads headers only.

    A format is a subclass in a file of its own. It must say which tensors there are and give their
    bytes, in row order and little-endian; it may say where the bytes lie in files (`extents`) or
    in memory (`view`), which spares the scan a copy.

    Attributes:
        label: how messages name it: a path, a hub id with revision, a class name.
        config: the model's `config.json` as plain JSON; empty when there is none.
        ties: names known to be the same storage as another: `{"lm_head.weight": "embed.weight"}`.
        buffers: names known to be buffers rather than weights.
        shows_buffers: whether names that are not in `buffers` are certainly weights.
        shows_ties: whether names that are not in `ties` are certainly tensors of their own.
        directory: where its files are; None for weights in memory.
        notes: what whoever reads a result must know of how the weights were come by, a sentence
            each: merged from an adapter, dequantised; every result of a pair shows them.
        is_live: whether someone else holds its weights and can write to them unseen; what was
            counted of them is counted again when it is asked for.

    >>> checkpoint = open_checkpoint("base")
    >>> checkpoint.info("model.norm.weight")
    TensorInfo(name='model.norm.weight', shape=(64,), dtype='bfloat16', nbytes=128)
    >>> checkpoint.read("model.norm.weight", slice(0, 2))
    tensor([1., 1.], dtype=torch.bfloat16)
    """

    label: str
    config: Mapping[str, object]
    ties: Mapping[str, str]
    buffers: frozenset[str]
    shows_buffers: bool = False
    shows_ties: bool = False
    directory: Path | None = None
    notes: tuple[str, ...] = ()
    is_live: bool = False
    _fingerprinted: tuple[Hashable, str] | None = None

    @abstractmethod
    def names(self) -> Sequence[str]:
        """All tensor names, in storage order."""

    @abstractmethod
    def info(self, name: str) -> TensorInfo:
        """What the header says of `name`; `CheckpointError` when there is no such tensor."""

    @abstractmethod
    def read_into(self, name: str, start: int, buffer: memoryview) -> None:
        """Fill `buffer` with the bytes of `name` from byte `start` on."""

    @abstractmethod
    def identity(self) -> Hashable:
        """What this checkpoint is right now, without reading its data.

        Files: device, inode, size and ctime of each, and a hash of its header. Two equal
        identities mean that nothing was written in between. Used by caches, and to notice a file
        that changes while it is read.
        """

    def identity_when_opened(self) -> Hashable:
        """What `identity()` was when the headers were read; weights in memory have none to read."""
        return self.identity()

    def check_unchanged(self) -> None:  # noqa: B027 (in memory there is nothing to check)
        """Raise `CheckpointError` if a file was written to after its header was read."""

    def extents(self, name: str, start: int, nbytes: int) -> Sequence[Extent] | None:
        """Where `nbytes` bytes of `name` from byte `start` on lie in files; None when they don't.

        The runs follow each other: joined in order they are the bytes asked for.
        """
        return None

    def view(self, name: str) -> Buffer | None:
        """All bytes of `name` where they are in memory, without a copy; None when they are not."""
        return None

    def address(self, name: str) -> tuple[torch.device, int] | None:
        """On which device the bytes of `name` lie in row order, and where; None when nowhere.

        The same as the start of `view`, without making one.
        """
        return None

    def read(self, name: str, rows: slice | None = None) -> torch.Tensor:
        """The tensor `name`, or some of its rows, as a torch tensor of its own.

        Args:
            name: one of `names()`.
            rows: a slice with step 1 along the first dimension; None reads all of it.

        Raises:
            CheckpointError: there is no such tensor, or its bytes cannot be read.
            ValueError: `rows` has a step, or the tensor has no dimensions.
        """
        import torch

        info = self.info(name)
        start, count = run_of_rows(info, rows)
        shape = info.shape if rows is None else (count, *info.shape[1:])
        dtype = getattr(torch, info.dtype)
        row = math.prod(info.shape[1:]) * DTYPES[info.dtype].itemsize
        data = bytearray(math.prod(shape) * DTYPES[info.dtype].itemsize)
        if not data:
            return torch.empty(shape, dtype=dtype)
        self.read_into(name, start * row, memoryview(data))
        return torch.frombuffer(data, dtype=dtype).reshape(shape)

    def fingerprint(self, name: str | None = None) -> str:
        """XXH3-128 of the content, the same in every format that stores the same bits.

        Args:
            name: one tensor, hashed over its bytes in row order; None hashes, over all tensors in
                the order of their names, name, dtype, shape and content. A tied tensor counts
                under its first name only: most formats store it once.

        Returns:
            32 hexadecimal digits.
        """
        import xxhash

        if name is None:
            return self._fingerprint_of_all()
        digest = xxhash.xxh3_128()
        info = self.info(name)
        piece = bytearray(min(info.nbytes, _HASH_PIECE))
        for start in range(0, info.nbytes, _HASH_PIECE):
            part = memoryview(piece)[: min(_HASH_PIECE, info.nbytes - start)]
            self.read_into(name, start, part)
            digest.update(part)
        return digest.hexdigest()

    def _fingerprint_of_all(self) -> str:
        """Read all tensors, unless the last time it was the same checkpoint."""
        import xxhash

        known = self.known_fingerprint
        if known is not None:
            return known
        identity = self.identity()
        digest = xxhash.xxh3_128()
        for each in sorted(set(self.names()) - self.ties.keys()):
            info = self.info(each)
            entry = [each, info.dtype, list(info.shape), self.fingerprint(each)]
            digest.update(repr(entry).encode("utf-8", "surrogatepass"))
        if not self.is_live:  # what is live can be written to unseen
            self._fingerprinted = identity, digest.hexdigest()
        return digest.hexdigest()

    @property
    def known_fingerprint(self) -> str | None:
        """What `fingerprint()` found; None where nobody asked, or it was written to since."""
        if self._fingerprinted is None:
            return None
        identity, fingerprint = self._fingerprinted
        try:
            return fingerprint if self.identity() == identity else None
        except CheckpointError:  # a file is gone
            return None

    def check_range(self, name: str, start: int, nbytes: int) -> None:
        """Raise unless `name` has `nbytes` bytes from byte `start` on; others lie beyond."""
        there = self.info(name).nbytes
        if start < 0 or start + nbytes > there:
            raise CheckpointError(
                f"{safe(name)} of {safe(self.label)} has {there:,} bytes; "
                f"bytes {start:,} to {start + nbytes:,} were asked for"
            )

    def unknown(self, name: str) -> CheckpointError:
        """The error for a name this checkpoint does not have."""
        hint = nearest(name, self.names())
        return CheckpointError(f"{safe(self.label)} has no tensor {safe(name)}{hint}")

    def __repr__(self) -> str:
        """One line: what and how many."""
        return f"<{type(self).__name__} {safe(self.label)}: {len(self.names())} tensors>"


def run_of_rows(info: TensorInfo, rows: slice | None) -> tuple[int, int]:
    """The first of the rows asked for and how many they are."""
    if rows is None:
        return 0, info.shape[0] if info.shape else 1
    if not info.shape:
        raise ValueError(f"rows={rows}: {safe(info.name)} is a single number and has no rows")
    start, stop, step = rows.indices(info.shape[0])
    if step != 1:
        raise ValueError(f"rows={rows} has a step; only whole runs of rows can be read")
    return start, max(stop - start, 0)
