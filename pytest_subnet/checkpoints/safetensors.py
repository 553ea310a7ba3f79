"""Safetensors: one file, or shards with an index."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pytest_subnet.checkpoints.base import Extent
from pytest_subnet.checkpoints.files import FileStamp, read_unchanged, stamp
from pytest_subnet.checkpoints.header import read_header
from pytest_subnet.checkpoints.sharded import check_shards, read_index
from pytest_subnet.checkpoints.stamped import StampedCheckpoint
from pytest_subnet.errors import CheckpointError
from pytest_subnet.text import safe

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

INDEX_SUFFIX = ".safetensors.index.json"


class SafetensorsCheckpoint(StampedCheckpoint):
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
        self._infos = {
            name: info for header in headers for name, (info, _) in header.tensors.items()
        }
        self._where: dict[str, tuple[FileStamp, int]] = {
            name: (header.stamp, offset)
            for header in headers
            for name, (_, offset) in header.tensors.items()
        }
        if not self._where:
            raise CheckpointError(f"{safe(path)} holds no tensors; was the model saved empty?")

    def extents(self, name: str, start: int, nbytes: int) -> Sequence[Extent]:
        """The one run of bytes that any part of a tensor is."""
        self.check_range(name, start, nbytes)
        file, offset = self._where[name]
        return (Extent(file.path, offset + start, nbytes),)

    def read_into(self, name: str, start: int, buffer: memoryview) -> None:
        """Read bytes from the file, which must be as it was when its header was read."""
        self.check_range(name, start, len(buffer))
        file, offset = self._where[name]
        read_unchanged(file, offset + start, buffer)
