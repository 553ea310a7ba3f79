"""Safetensors: one file, or shards with an index."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pytest_subnet.checkpoints.base import Checkpoint, Extent, TensorInfo
from pytest_subnet.checkpoints.files import FileStamp, check_stamp, read_unchanged, stamp
from pytest_subnet.checkpoints.header import read_header
from pytest_subnet.checkpoints.sharded import check_shards, read_index
from pytest_subnet.errors import CheckpointError
from pytest_subnet.text import safe

if TYPE_CHECKING:
    from collections.abc import Hashable, Mapping, Sequence
    from pathlib import Path

INDEX_SUFFIX = ".safetensors.index.json"


class SafetensorsCheckpoint(Checkpoint):
    """Weights in safetensors files; neither torch nor safetensors is imported to read them."""

    def __init__(self, path: Path, *, label: str, config: Mapping[str, object]) -> None:
        """Read the headers.

        Args:
            path: a `.safetensors` file or a `.safetensors.index.json`.
            label: how messages name the checkpoint.
            config: its `config.json`.
        """
        self.label = label
        self.directory = path.parent
        self.config = config
        self.ties = {}
        self.buffers = frozenset()
        index: list[FileStamp] = []
        if path.name.endswith(INDEX_SUFFIX):
            index = [stamp(path)]
            expected = read_index(path, (".safetensors",))
            headers = [read_header(path.parent / shard) for shard in expected]
            found = dict(zip(expected, (header.tensors for header in headers), strict=True))
            check_shards(path, expected, found)
        else:
            headers = [read_header(path)]
        self._stamps = (*index, *(header.stamp for header in headers))
        self._digests = tuple(header.digest for header in headers)
        self._where: dict[str, tuple[TensorInfo, FileStamp, int]] = {
            name: (info, header.stamp, offset)
            for header in headers
            for name, (info, offset) in header.tensors.items()
        }
        if not self._where:
            raise CheckpointError(f"{safe(path)} holds no tensors; was the model saved empty?")

    def names(self) -> Sequence[str]:
        """All tensor names, shard by shard in the order of their bytes."""
        return list(self._where)

    def info(self, name: str) -> TensorInfo:
        """What the header says of `name`."""
        try:
            return self._where[name][0]
        except KeyError:
            raise self.unknown(name) from None

    def extents(self, name: str, start: int, nbytes: int) -> Sequence[Extent]:
        """The one run of bytes that any part of a tensor is."""
        self.check_range(name, start, nbytes)
        _, file, offset = self._where[name]
        return (Extent(file.path, offset + start, nbytes),)

    def read_into(self, name: str, start: int, buffer: memoryview) -> None:
        """Read bytes from the file, which must be as it was when its header was read."""
        self.check_range(name, start, len(buffer))
        _, file, offset = self._where[name]
        read_unchanged(file, offset + start, buffer)

    def identity(self) -> Hashable:
        """The stamps of index and shards as they are now, and what their headers were."""
        return tuple(stamp(known.path) for known in self._stamps), self._digests

    def identity_when_opened(self) -> Hashable:
        """The same with the stamps that were taken before each header was read."""
        return self._stamps, self._digests

    def check_unchanged(self) -> None:
        """Raise if index or shards were written to since."""
        for known in self._stamps:
            check_stamp(known)
