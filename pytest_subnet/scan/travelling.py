"""What may leave this machine: names, addresses and byte ranges of files, never weights."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_subnet.checkpoints.base import Checkpoint, Extent, TensorInfo
from pytest_subnet.checkpoints.files import FileReader
from pytest_subnet.checkpoints.remote.urls import is_url
from pytest_subnet.errors import CheckpointError
from pytest_subnet.scan.units import Segment
from pytest_subnet.text import safe

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterable, Mapping, Sequence

    from pytest_subnet.pairs import ModelPair
    from pytest_subnet.scan.units import ScanUnit


def to_travel(pair: ModelPair, unit: ScanUnit) -> ScanUnit:
    """`unit` of `pair` as it means the same in any working directory.

    Raises:
        CheckpointError: its bytes are in no file.
    """
    first = unit.segments[0]
    return unit._replace(
        segments=_Segments(unit.segments),
        base=_absolute(pair.base, first.base_name, unit.base),
        tuned=_absolute(pair.tuned, first.tuned_name, unit.tuned),
    )


class _Segments(tuple[Segment, ...]):
    """Segments that are pickled as columns: a unit may have thousands."""

    __slots__ = ()

    def __reduce__(self) -> tuple[Any, ...]:
        return _segments_of, tuple(zip(*self, strict=True))


def _segments_of(*columns: Sequence[Any]) -> _Segments:
    return _Segments(map(Segment._make, zip(*columns, strict=True)))


def paths_of(unit: ScanUnit) -> set[str]:
    """The files on disk in which a unit that may travel lies."""
    return _on_disk((*(unit.base or ()), *(unit.tuned or ())))


def device_there(device: str | None) -> str | None:
    """What a device is called on another machine: a task sees the GPU it was given as the first."""
    return "cuda" if device is not None and device.startswith("cuda") else device


def _absolute(
    checkpoint: Checkpoint, name: str, extents: Sequence[Extent] | None
) -> tuple[Extent, ...]:
    if extents is None:
        raise CheckpointError(
            f'engine="ray" (--subnet-engine ray) reads files where its workers are, and '
            f"{safe(name)} of {safe(checkpoint.label)} is in no file as it is compared: it is in "
            'memory, compressed or computed; save the model first, or take engine="threads"'
        )
    return tuple(
        extent if is_url(extent.path) else extent._replace(path=str(Path(extent.path).absolute()))
        for extent in extents
    )


def _on_disk(extents: Iterable[Extent]) -> set[str]:
    """The paths among them: what is at an address is the same wherever it is asked for."""
    return {extent.path for extent in extents if not is_url(extent.path)}


class FileRanges(Checkpoint):
    """Some tensors of a checkpoint, as byte ranges of files that are read wherever they are seen.

    That the files are what they were is for the one who sends it to check.
    """

    def __init__(
        self,
        label: str,
        infos: Mapping[str, TensorInfo],
        extents: Mapping[str, tuple[Extent, ...]],
    ) -> None:
        """Take what headers said; nothing is opened."""
        self.label = label
        self.config, self.ties, self.buffers = {}, {}, frozenset()
        self._infos = dict(infos)
        self._extents = dict(extents)

    @classmethod
    def of(cls, checkpoint: Checkpoint, names: Iterable[str]) -> FileRanges:
        """The tensors `names` of `checkpoint`; `CheckpointError` where one is in no file."""
        infos = {name: checkpoint.info(name) for name in names}
        extents = {
            name: _absolute(checkpoint, name, checkpoint.extents(name, 0, info.nbytes))
            for name, info in infos.items()
        }
        return cls(checkpoint.label, infos, extents)

    def paths_of(self, name: str) -> set[str]:
        """The files on disk in which `name` lies."""
        return _on_disk(self._extents[name])

    def names(self) -> Sequence[str]:
        """As `Checkpoint.names`."""
        return list(self._infos)

    def info(self, name: str) -> TensorInfo:
        """As `Checkpoint.info`."""
        if name not in self._infos:
            raise self.unknown(name)
        return self._infos[name]

    def extents(self, name: str, start: int, nbytes: int) -> Sequence[Extent]:
        """As `Checkpoint.extents`."""
        self.check_range(name, start, nbytes)
        found = []
        for path, offset, length in self._extents[name]:
            skipped = min(start, length)
            taken = min(nbytes, length - skipped)
            if taken:
                found.append(Extent(path, offset + skipped, taken))
            start, nbytes = start - skipped, nbytes - taken
        return found

    def read_into(self, name: str, start: int, buffer: memoryview) -> None:
        """As `Checkpoint.read_into`."""
        done = 0
        with FileReader() as reader:
            for path, offset, length in self.extents(name, start, len(buffer)):
                reader.read_into(path, offset, buffer[done : done + length])
                done += length

    def identity(self) -> Hashable:
        """As `Checkpoint.identity`, without a look at the files."""
        return tuple(self._extents.items())
