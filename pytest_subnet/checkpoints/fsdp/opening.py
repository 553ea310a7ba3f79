"""FSDP shards as verl and SkyRL write them: one file a rank, each with its part of every tensor."""

from __future__ import annotations

import math
import re
from itertools import accumulate, chain
from typing import TYPE_CHECKING, NamedTuple

from pytest_subnet.checkpoints.base import Extent, TensorInfo
from pytest_subnet.checkpoints.dtypes import DTYPES
from pytest_subnet.checkpoints.files import (
    FileReader,
    check_stamp,
    exists,
    names_in,
)
from pytest_subnet.checkpoints.folders import whole_weights
from pytest_subnet.checkpoints.fsdp.ranks import Part, Rank, Whole, place_in_mesh, read_rank
from pytest_subnet.checkpoints.json_files import read_json
from pytest_subnet.checkpoints.stamped import StampedCheckpoint
from pytest_subnet.checkpoints.wording import short
from pytest_subnet.errors import CheckpointError
from pytest_subnet.text import first_few, plural, safe

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterator, Mapping, Sequence
    from pathlib import Path

    from pytest_subnet.checkpoints.base import Checkpoint

_SHARD = re.compile(r"model_world_size_([1-9][0-9]{0,5})_rank_(0|[1-9][0-9]{0,5})\.pt")


def recognises(present: Sequence[str]) -> bool:
    """Whether there is a shard among the names in a directory.

    >>> recognises(["config.json", "model_world_size_8_rank_0.pt"])
    True
    """
    return any(_SHARD.fullmatch(name) for name in present)


def open_directory(directory: Path, label: str) -> Checkpoint:
    """The weights whose shards lie in `directory`; only the pickles are read, no data.

    Raises:
        CheckpointError: a rank is missing, the files are of several runs or do not add up, a
            tensor is split in a way that is not known, or a file is damaged or unsafe.
    """
    paths = _paths_of_ranks(directory)
    _refuse_whole_weights(directory)
    return FsdpCheckpoint(paths, label=label, config=_config(directory))


def _paths_of_ranks(directory: Path) -> list[Path]:
    """The file of every rank, in numeric order."""
    found: dict[int, set[int]] = {}
    for name in names_in(directory):
        match = _SHARD.fullmatch(name)
        if match:
            found.setdefault(int(match[1]), set()).add(int(match[2]))
    if len(found) != 1:
        sizes = ", ".join(
            f"{plural(len(ranks), 'file')} of world size {world}"
            for world, ranks in sorted(found.items())
        )
        raise CheckpointError(
            f"{safe(directory)} holds shards of several runs: {sizes}; "
            "remove the files of all but one"
        )
    ((world, ranks),) = found.items()
    missing = [rank for rank in range(world) if rank not in ranks]
    if missing:
        raise CheckpointError(
            f"{safe(directory)} holds {plural(len(ranks & set(range(world))), 'shard')} of {world},"
            f" {len(missing)} missing: {first_few([_file_name(world, rank) for rank in missing])}; "
            "on multi-node runs each node keeps its own ranks: copy the files of all nodes here"
        )
    beyond = sorted(ranks - set(range(world)))
    if beyond:
        raise CheckpointError(
            f"{safe(directory)} holds {first_few([_file_name(world, rank) for rank in beyond])}, "
            f"but {plural(world, 'rank')} count from 0 to {world - 1}; remove what is not of this "
            "run"
        )
    return [directory / _file_name(world, rank) for rank in range(world)]


def _file_name(world: int, rank: int) -> str:
    return f"model_world_size_{world}_rank_{rank}.pt"


def _refuse_whole_weights(directory: Path) -> None:
    """Raise if there is a second checkpoint beside the shards: which one counts is not ours to say.

    Trainers that export the model as well put it into `huggingface`.
    """
    exported = directory / "huggingface"
    for place in (directory, exported):
        whole = whole_weights(names_in(place)) if place.is_dir() else []
        if whole:
            raise CheckpointError(
                f"{safe(directory)} holds two checkpoints: FSDP shards, and "
                f"{first_few([str((place / name).relative_to(directory)) for name in whole])}; "
                f"pass {safe(place / whole[0])} for the latter, or move it away for the shards"
            )


def _config(directory: Path) -> dict[str, object]:
    for path in (directory / "huggingface" / "config.json", directory / "config.json"):
        if exists(path):
            return read_json(path)
    return {}


class _Piece(NamedTuple):
    """A box of a tensor that lies in the file of `rank`, in row order.

    Attributes:
        rank: whose file.
        offset: its first byte there; None where it is kept in memory.
        begin: its first entry along each dimension of the whole tensor.
        shape: how many entries along each.
    """

    rank: int
    offset: int | None
    begin: tuple[int, ...]
    shape: tuple[int, ...]


class FsdpCheckpoint(StampedCheckpoint):
    """Weights in one file for each rank of a training run with FSDP."""

    def __init__(self, paths: Sequence[Path], *, label: str, config: Mapping[str, object]) -> None:
        """Read the pickles, not the data.

        Args:
            paths: the file of every rank, in their order.
            label: how messages name the checkpoint.
            config: its `config.json`.
        """
        self.label = label
        self.config = config
        self.directory = paths[0].parent
        self.buffers = frozenset()
        ranks: list[Rank] = []
        for rank, path in enumerate(paths):
            ranks.append(read_rank(path, rank, len(paths)))
            _check_same_run(paths[0], ranks[0].wholes, path, ranks[-1].wholes)
        self._stamps = tuple(rank.stamp for rank in ranks)
        self._odd = {number: rank.odd for number, rank in enumerate(ranks) if rank.odd is not None}
        self._infos: dict[str, TensorInfo] = {}
        self._pieces: dict[str, tuple[_Piece, ...]] = {}
        for name, whole in ranks[0].wholes.items():
            parts = [rank.parts[name] for rank in ranks]
            self._pieces[name] = _pieces(self.directory, name, whole, parts)
            nbytes = math.prod(whole.shape) * DTYPES[whole.dtype].itemsize
            self._infos[name] = TensorInfo(name, whole.shape, whole.dtype, nbytes)
            if len(ranks) > 1 and not whole.mesh:
                self._refuse_different_copies(name, parts)
        self.ties = self._shared()

    def extents(self, name: str, start: int, nbytes: int) -> Sequence[Extent] | None:
        """A run for each rank; None where the ranks do not hold rows one after the other."""
        self.check_range(name, start, nbytes)
        pieces = self._pieces[name]
        if not self._are_rows(name) or any(piece.offset is None for piece in pieces):
            return None
        return [
            Extent(self._stamps[piece.rank].path, (piece.offset or 0) + skip, count)
            for piece, skip, count in self._runs(name, start, nbytes)
        ]

    def read_into(self, name: str, start: int, buffer: memoryview) -> None:
        """Put the parts of the ranks together, whose files must be as they were when opened."""
        self.check_range(name, start, len(buffer))
        with FileReader() as reader:
            if not self._are_rows(name):
                self._put_together(reader, name, start, buffer)
                return
            done = 0
            for piece, skip, count in self._runs(name, start, len(buffer)):
                self._read_piece(reader, name, piece, skip, buffer[done : done + count])
                done += count

    def _are_rows(self, name: str) -> bool:
        """Whether the pieces, one after the other, are the tensor in row order."""
        shape = self._infos[name].shape
        return all(piece.shape[1:] == shape[1:] for piece in self._pieces[name])

    def _runs(self, name: str, start: int, nbytes: int) -> Iterator[tuple[_Piece, int, int]]:
        """The pieces that `nbytes` bytes from byte `start` on lie in: from which byte, how many."""
        itemsize = DTYPES[self._infos[name].dtype].itemsize
        begin = 0
        for piece in self._pieces[name]:
            end = begin + math.prod(piece.shape) * itemsize
            first, last = max(start, begin), min(start + nbytes, end)
            if first < last:
                yield piece, first - begin, last - first
            begin = end

    def _put_together(self, reader: FileReader, name: str, start: int, buffer: memoryview) -> None:
        """Fill `buffer` from pieces that are no whole rows: each row that it touches is read."""
        import numpy as np

        info = self._infos[name]
        itemsize = DTYPES[info.dtype].itemsize
        row = math.prod(info.shape[1:]) * itemsize
        first, last = start // row, -(-(start + len(buffer)) // row)
        rows = np.empty((last - first, *info.shape[1:], itemsize), np.uint8)
        for begin, end, piece in (
            (max(first, piece.begin[0]), min(last, piece.begin[0] + piece.shape[0]), piece)
            for piece in self._pieces[name]
        ):
            if begin < end:
                part = np.empty((end - begin, *piece.shape[1:], itemsize), np.uint8)
                skip = (begin - piece.begin[0]) * math.prod(piece.shape[1:]) * itemsize
                self._read_piece(reader, name, piece, skip, part.reshape(-1).data)
                box = [slice(a, a + n) for a, n in zip(piece.begin, piece.shape, strict=True)]
                rows[(slice(begin - first, end - first), *box[1:])] = part
        buffer[:] = rows.reshape(-1)[start - first * row :][: len(buffer)].data

    def _refuse_different_copies(self, name: str, parts: Sequence[Part]) -> None:
        """Raise unless what is no part of a sharded tensor is the same on every rank."""
        nbytes = self._infos[name].nbytes
        start = (0,) * len(self._infos[name].shape)
        first = bytearray()
        with FileReader() as reader:
            for rank, part in enumerate(parts):
                data = bytearray(nbytes)
                piece = _Piece(rank, part.offset, start, part.shape)
                self._read_piece(reader, name, piece, 0, memoryview(data))
                if rank and data != first:
                    raise CheckpointError(
                        f"{short(name)} in {safe(self.directory)} is whole on every rank, and "
                        f"another on rank {rank} than on rank 0; parallel experts, each rank with "
                        "its own? merge the shards with the trainer's own script"
                    )
                first = data

    def _read_piece(
        self, reader: FileReader, name: str, piece: _Piece, skip: int, buffer: memoryview
    ) -> None:
        from pytest_subnet.checkpoints.torch_files import as_opened

        known = self._stamps[piece.rank]
        if piece.offset is None:
            with as_opened(known):
                self._odd[piece.rank].read_into(name, skip, buffer)
        else:
            reader.read_into(known.path, piece.offset + skip, buffer)
            check_stamp(known)

    def _shared(self) -> dict[str, str]:
        """The names that lie in the same place of every file as one before them."""
        first: dict[Hashable, str] = {}
        ties = {}
        for name, pieces in self._pieces.items():
            if not pieces or any(piece.offset is None for piece in pieces):
                continue
            info = self._infos[name]
            known = first.setdefault((info.dtype, info.shape, pieces), name)
            if known != name:
                ties[name] = known
        return ties


def _check_same_run(
    first: Path, wholes: Mapping[str, Whole], path: Path, others: Mapping[str, Whole]
) -> None:
    """Raise, with the first tensor of which two ranks do not say the same."""
    for name in chain(wholes, others):
        one, other = wholes.get(name), others.get(name)
        if one != other:
            raise CheckpointError(
                f"{safe(path)} and {safe(first.name)} are not of one checkpoint: {short(name)} is "
                f"{other or 'missing'} in the former, {one or 'missing'} in the latter; were the "
                "files of two runs or steps mixed?"
            )


def _pieces(directory: Path, name: str, whole: Whole, parts: Sequence[Part]) -> tuple[_Piece, ...]:
    """Where each part lies in the tensor, without copies and without what is empty."""
    places = [place_in_mesh(rank, whole.mesh) for rank in range(len(parts))]
    begins: dict[int, list[int]] = {}
    for dim, length in enumerate(whole.shape):
        axis = whole.split.index(dim) if dim in whole.split else None
        lengths = [length] if axis is None else [0] * whole.mesh[axis]
        for part, place in zip(parts, places, strict=True):
            if axis is not None and sum(place) == place[axis]:
                lengths[place[axis]] = part.shape[dim]
        begins[dim] = list(accumulate(lengths, initial=0))
        wanted = [lengths[0 if axis is None else place[axis]] for place in places]
        if sum(lengths) != length or wanted != [part.shape[dim] for part in parts]:
            held = first_few([str(part.shape[dim]) for part in parts], 8)
            raise CheckpointError(
                f"the shards in {safe(directory)} do not add up: {short(name)} is {whole}, but "
                f"along dimension {dim} the ranks hold {held}; were the files of two runs or "
                "steps mixed?"
            )
    copies = [axis for axis, dim in enumerate(whole.split) if dim is None]
    found = [
        _Piece(
            rank,
            part.offset,
            tuple(
                begins[dim][place[whole.split.index(dim)]] if dim in whole.split else 0
                for dim in range(len(whole.shape))
            ),
            part.shape,
        )
        for rank, (part, place) in enumerate(zip(parts, places, strict=True))
        if math.prod(part.shape) and not any(place[axis] for axis in copies)
    ]
    return tuple(found if whole.mesh else found[:1])
