"""Torch distributed checkpoints: `.metadata` and `*.distcp`, also as Megatron writes them.

They are read without a process group, and one tensor at a time: where the bytes of a chunk lie is
found when it is first asked for.
"""

from __future__ import annotations

import math
import re
from bisect import bisect_right
from typing import TYPE_CHECKING, Any, NamedTuple

from pytest_subnet.checkpoints.base import Extent, TensorInfo
from pytest_subnet.checkpoints.dcp.boxes import Box, runs_between, start_of_run
from pytest_subnet.checkpoints.dcp.chunks import load, locate
from pytest_subnet.checkpoints.dcp.metadata import read_metadata
from pytest_subnet.checkpoints.dtypes import DTYPES
from pytest_subnet.checkpoints.files import (
    FileReader,
    FileStamp,
    check_stamp,
    exists,
    names_in,
    stamp,
)
from pytest_subnet.checkpoints.json_files import read_json
from pytest_subnet.checkpoints.memory import is_extra_state
from pytest_subnet.checkpoints.stamped import StampedCheckpoint
from pytest_subnet.checkpoints.wording import short
from pytest_subnet.errors import CheckpointError
from pytest_subnet.text import first_few, plural, safe

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray

    from pytest_subnet.checkpoints.base import Checkpoint
    from pytest_subnet.checkpoints.dcp.metadata import Chunk, Description, StoredTensor

_METADATA = ".metadata"
_SUFFIX = ".distcp"
_MEGATRON = "metadata.json"
_OTHER_WEIGHTS = re.compile(r".*\.safetensors|pytorch_model.*\.bin")
# Under these keys trainers save what is no weight, but made of tensors.
_TRAINER_STATE = re.compile(
    r"(?:\w+_)?(?:optim|optimizer|scheduler|scaler|dataloader|rng_state|random_state|train_state|"
    r"trainer_state|callback|loop)(?:s|_\w+)?|step|global_step|epoch|iteration",
    re.ASCII,
)


class _Tensor(NamedTuple):
    """A tensor and where its chunks start in it, as bytes; None when they are not whole runs."""

    info: TensorInfo
    chunks: tuple[Chunk, ...]
    starts: tuple[int, ...] | None


class DistributedCheckpoint(StampedCheckpoint):
    """Weights that `torch.distributed.checkpoint` saved, sharded or not."""

    def __init__(self, directory: Path, *, label: str, config: Mapping[str, object]) -> None:
        """Read `.metadata`.

        Args:
            directory: where it and the files of chunks are.
            label: how messages name the checkpoint.
            config: its `config.json`.
        """
        path = directory / _METADATA
        of_metadata = stamp(path)
        is_megatron = exists(directory / _MEGATRON)
        described = read_metadata(path, _is_megatron_weight if is_megatron else _is_weight)
        if not described.tensors:
            raise _no_weights(path, described.others)
        prefix = _prefix(described)
        self._digests = (described.digest,)
        self._files = _stamps(directory, described)
        self._stamps = (of_metadata, *self._files.values())
        self._tensors = dict(
            (name.removeprefix(prefix), _laid_out(name.removeprefix(prefix), stored))
            for name, stored in sorted(described.tensors.items(), key=_first_byte)
        )
        self._infos = {name: tensor.info for name, tensor in self._tensors.items()}
        self._places: dict[Chunk, int | None] = {}
        self._kept: tuple[Chunk, NDArray[np.uint8]] | None = None
        self.label = label
        self.config = config
        self.ties = {}
        self.buffers = frozenset()
        self.directory = directory
        self.notes = tuple(_notes(label, prefix, described.others))

    def __getstate__(self) -> dict[str, Any]:
        """Without what was loaded: it is quicker to load it again than to send it."""
        return {**self.__dict__, "_kept": None}

    def extents(self, name: str, start: int, nbytes: int) -> Sequence[Extent] | None:
        """Where the bytes lie, chunk by chunk; None where chunks are not whole runs of them."""
        self.check_range(name, start, nbytes)
        tensor = self._tensors[name]
        if tensor.starts is None:
            return None
        found: list[Extent] = []
        with FileReader() as reader:
            k, position, end = bisect_right(tensor.starts, start) - 1, start, start + nbytes
            while position < end:
                chunk = tensor.chunks[k]
                place = self._place(reader, tensor.info, chunk)
                if place is None:
                    return None
                k += 1
                stop = min(end, tensor.starts[k] if k < len(tensor.starts) else end)
                skipped = position - tensor.starts[k - 1]
                path = self._files[chunk.file].path
                found.append(Extent(path, place + skipped, stop - position))
                position = stop
        return found

    def read_into(self, name: str, start: int, buffer: memoryview) -> None:
        """Read bytes from the files, which must be as they were when they were opened."""
        self.check_range(name, start, len(buffer))
        tensor = self._tensors[name]
        end = start + len(buffer)
        shape = (*tensor.info.shape, DTYPES[tensor.info.dtype].itemsize)
        import numpy as np

        target = np.frombuffer(buffer, np.uint8)
        first, last = 0, len(tensor.chunks)
        if tensor.starts is not None:
            first = max(0, bisect_right(tensor.starts, start) - 1)
            last = bisect_right(tensor.starts, end - 1)
        touched: set[str] = set()
        with FileReader() as reader:
            for chunk in tensor.chunks[first:last]:
                pieces = runs_between(_in_bytes(chunk.box, shape[-1]), shape, start, end)
                for runs in pieces:
                    touched.add(chunk.file)
                    packed = self._read(reader, tensor.info, chunk, runs.source, runs.size)
                    at = runs.target - start
                    if runs.count == 1:
                        target[at : at + runs.nbytes] = packed
                    else:
                        _strided(target, at, runs.count, runs.nbytes, runs.step)[...] = (
                            packed.reshape(runs.count, runs.nbytes)
                        )
        for file in touched:
            check_stamp(self._files[file])

    def _read(
        self, reader: FileReader, info: TensorInfo, chunk: Chunk, start: int, nbytes: int
    ) -> NDArray[np.uint8]:
        """Bytes of a chunk, which are packed in row order."""
        import numpy as np

        path = self._files[chunk.file].path
        place = self._place(reader, info, chunk)
        if place is not None:
            packed = np.empty(nbytes, np.uint8)
            reader.read_into(path, place + start, packed.data)
            return packed
        # Threads may ask for different chunks: what is kept is used only if it is the right one.
        kept = self._kept
        if kept is None or kept[0] != chunk:
            kept = self._kept = (chunk, load(reader, path, chunk, info.dtype, info.name))
        return kept[1][start : start + nbytes]

    def _place(self, reader: FileReader, info: TensorInfo, chunk: Chunk) -> int | None:
        if chunk not in self._places:
            path = self._files[chunk.file].path
            self._places[chunk] = locate(reader, path, chunk, info.dtype)
        return self._places[chunk]


def _strided(
    target: NDArray[np.uint8], start: int, count: int, nbytes: int, step: int
) -> NDArray[np.uint8]:
    """`count` runs of `nbytes` in `target`, `step` apart, as the rows of a matrix."""
    import numpy as np

    return np.lib.stride_tricks.as_strided(target[start:], (count, nbytes), (step, 1))


def _in_bytes(box: Box, itemsize: int) -> Box:
    return Box((*box.offsets, 0), (*box.sizes, itemsize))


def _laid_out(name: str, stored: StoredTensor) -> _Tensor:
    itemsize = DTYPES[stored.dtype].itemsize
    shape = (*stored.shape, itemsize)
    info = TensorInfo(name, stored.shape, stored.dtype, math.prod(shape))
    placed = [
        (start_of_run(_in_bytes(chunk.box, itemsize), shape), chunk) for chunk in stored.chunks
    ]
    runs = sorted((start, chunk) for start, chunk in placed if start is not None)
    if len(runs) < len(placed):
        return _Tensor(info, stored.chunks, None)
    return _Tensor(info, tuple(chunk for _, chunk in runs), tuple(start for start, _ in runs))


def _first_byte(item: tuple[str, StoredTensor]) -> tuple[str, int]:
    """Where in the files a tensor starts; one without entries is nowhere, and comes first."""
    return min(((chunk.file, chunk.start) for chunk in item[1].chunks), default=("", 0))


def _stamps(directory: Path, described: Description) -> dict[str, FileStamp]:
    """The stamps of the files that hold chunks, each long enough for them."""
    ends: dict[str, tuple[int, str]] = {}
    for name, stored in described.tensors.items():
        for chunk in stored.chunks:
            last = (chunk.start + chunk.nbytes, name)
            ends[chunk.file] = max(ends.get(chunk.file, last), last)
    missing = [file for file in sorted(ends) if not exists(directory / file)]
    if missing:
        raise CheckpointError(
            f"{safe(directory / _METADATA)} lists {plural(len(ends), 'file')} of chunks, "
            f"{len(missing)} missing: {first_few([short(file) for file in missing])}; every node "
            f"writes its own, copy them all into {safe(directory)}"
        )
    stamps = {file: stamp(directory / file) for file in sorted(ends)}
    for file, (end, name) in ends.items():
        if stamps[file].size < end:
            raise CheckpointError(
                f"{safe(stamps[file].path)} has {stamps[file].size:,} bytes, but .metadata places "
                f"a chunk of {short(name)} up to byte {end:,}; it was cut short, save or copy it "
                "again"
            )
    return stamps


def _is_weight(name: str, keys: tuple[str, ...]) -> bool:
    """Whether a tensor is one of the model, by where in the state dict it was saved."""
    above = keys[:-1] or name.split(".")[:1]
    return not is_extra_state(name) and not any(map(_TRAINER_STATE.fullmatch, above))


def _is_megatron_weight(name: str, keys: tuple[str, ...]) -> bool:
    return "optimizer" not in name and "_state" not in name


def _no_weights(path: Path, others: Sequence[str]) -> CheckpointError:
    if not others:
        return CheckpointError(f"{safe(path)} lists no tensors; was the model saved empty?")
    return CheckpointError(
        f"{safe(path)} lists {plural(len(others), 'tensor')}, none of a model: "
        f"{first_few([short(name) for name in others])}; pass the directory that the model was "
        "saved to"
    )


def _prefix(described: Description) -> str:
    """Under which keys of the state dict the trainer put the model, if all of it is there."""
    above = {described.paths.get(name, ())[:-1] for name in described.tensors}
    keys = above.pop() if len(above) == 1 else ()
    return "".join(f"{key}." for key in keys)


def _notes(label: str, prefix: str, others: Sequence[str]) -> list[str]:
    notes = []
    if prefix:
        notes.append(f"{safe(label)}: names are without {short(prefix)}, where the model was saved")
    if others:
        notes.append(
            f"{safe(label)}: {plural(len(others), 'tensor')} left out, no weights: "
            f"{first_few([short(name) for name in others], 1)}"
        )
    return notes


def recognises(present: Sequence[str]) -> bool:
    """Whether a directory of these names is a distributed checkpoint.

    >>> recognises([".metadata", "__0_0.distcp"]), recognises(["model.safetensors"])
    (True, False)
    """
    if any(name.endswith(_SUFFIX) for name in present):
        return True
    is_megatron = _MEGATRON in present and "common.pt" in present
    others = any(map(_OTHER_WEIGHTS.fullmatch, present))
    return is_megatron or (_METADATA in present and not others)


def is_file_of(name: str) -> bool:
    """Whether a file of this name is a part of a distributed checkpoint.

    >>> is_file_of(".metadata"), is_file_of("__3_0.distcp"), is_file_of("model.safetensors")
    (True, True, False)
    """
    return name == _METADATA or name.endswith(_SUFFIX)


def open_file(path: Path, label: str) -> Checkpoint:
    """The checkpoint that a `.metadata` describes, whatever else is beside it."""
    if path.name != _METADATA:
        raise CheckpointError(
            f"{safe(path)} holds chunks of a distributed checkpoint, and which ones is said in the "
            f".metadata beside it; pass the directory, {safe(path.parent)}"
        )
    return _open(path.parent, names_in(path.parent), label)


def open_directory(directory: Path, label: str) -> Checkpoint:
    """The checkpoint in `directory`; only `.metadata` is read."""
    present = names_in(directory)
    weights = list(filter(_OTHER_WEIGHTS.fullmatch, present))
    if weights:
        chunks = [name for name in present if name.endswith(_SUFFIX)]
        raise CheckpointError(
            f"{safe(directory)} holds two checkpoints: {first_few([*weights[:1], *chunks[:1]])}; "
            "remove the stale one, or pass the file that counts"
        )
    return _open(directory, present, label)


def _open(directory: Path, present: Sequence[str], label: str) -> Checkpoint:
    if _MEGATRON in present:
        _check_backend(directory / _MEGATRON)
    if _METADATA not in present:
        found = first_few(present) if present else "nothing"
        raise CheckpointError(
            f"{safe(directory)} has no .metadata, which says what is in its chunks (found "
            f"{found}); it is written last and by one node, wait for the save to end or copy it "
            "from there"
        )
    config_path = directory / "config.json"
    config = read_json(config_path) if exists(config_path) else {}
    return DistributedCheckpoint(directory, label=label, config=config)


def _check_backend(path: Path) -> None:
    """Raise if Megatron wrote the tensors in another format than torch's."""
    backend = read_json(path).get("sharded_backend", "torch_dist")
    if backend != "torch_dist":
        raise CheckpointError(
            f"{safe(path.parent)} is a Megatron checkpoint with the sharded backend "
            f"{short(backend)}, which cannot be read; save it with --ckpt-format torch_dist"
        )
