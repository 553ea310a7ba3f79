"""Safetensors: one file, or shards with an index."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pytest_subnet.checkpoints.base import Checkpoint, Extent, TensorInfo
from pytest_subnet.checkpoints.files import FileReader, stamp
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
        if path.name.endswith(INDEX_SUFFIX):
            expected = read_index(path, (".safetensors",))
            headers = [read_header(path.parent / shard) for shard in expected]
            found = dict(zip(expected, (header.tensors for header in headers), strict=True))
            check_shards(path, expected, found)
            self._index = [stamp(path)]
        else:
            headers = [read_header(path)]
            self._index = []
        self._stamps = [header.stamp for header in headers]
        self._digests = tuple(header.digest for header in headers)
        self._where: dict[str, tuple[TensorInfo, str, int]] = {
            name: (info, header.stamp.path, offset)
            for header in headers
            for name, (info, offset) in header.tensors.items()
        }
        if not self._where:
            raise CheckpointError(f"{safe(path)} holds no tensors; was the model saved empty?")

    def names(self) -> Sequence[str]:
        return list(self._where)

    def info(self, name: str) -> TensorInfo:
        try:
            return self._where[name][0]
        except KeyError:
            raise self.unknown(name) from None

    def extents(self, name: str, start: int, nbytes: int) -> Sequence[Extent]:
        _, path, offset = self._where[name]
        return (Extent(path, offset + start, nbytes),)

    def read_into(self, name: str, start: int, buffer: memoryview) -> None:
        self.info(name)
        (extent,) = self.extents(name, start, len(buffer))
        with FileReader() as reader:
            reader.read_into(extent.path, extent.offset, buffer)

    def identity(self) -> Hashable:
        return (
            tuple(stamp(known.path) for known in (*self._index, *self._stamps)),
            self._digests,
        )
