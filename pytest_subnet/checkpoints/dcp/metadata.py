"""What the `.metadata` of a torch distributed checkpoint says, read without running any of it.

It is a pickle of torch's own classes. None of them is needed to know names, shapes and places:
each is read as a plain record, so that torch is not imported and nothing that a file asks for is.
"""

from __future__ import annotations

import io
import math
import pickle
import re
from typing import TYPE_CHECKING, NamedTuple, NoReturn

from pytest_subnet.checkpoints.dcp.boxes import Box, fault_in_cover
from pytest_subnet.checkpoints.dtypes import DTYPES
from pytest_subnet.checkpoints.files import refuse_pointer, unreadable
from pytest_subnet.checkpoints.opcodes import HeavyTupleError, look_over
from pytest_subnet.checkpoints.wording import broken, short
from pytest_subnet.errors import CheckpointError
from pytest_subnet.text import first_few, safe

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    Keys = tuple[str, ...]


class Chunk(NamedTuple):
    """A part of a tensor in a file of its own length: what `torch.save` wrote of it.

    Attributes:
        box: which part of the tensor it is.
        file: the name of the file beside `.metadata`.
        start: the first byte of what `torch.save` wrote.
        nbytes: how many bytes it wrote.
    """

    box: Box
    file: str
    start: int
    nbytes: int


class StoredTensor(NamedTuple):
    """A tensor as `.metadata` describes it; its chunks cover it, each entry once."""

    dtype: str
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]


class Description(NamedTuple):
    """What `.metadata` says.

    Attributes:
        tensors: those that were asked for, by name.
        others: the names of the tensors that were not.
        paths: where in the state dict that was saved each of `tensors` was, as far as it is said.
        digest: a hash of the file.
    """

    tensors: dict[str, StoredTensor]
    others: list[str]
    paths: dict[str, Keys]
    digest: str


class _Record:
    """What stands for an object of torch: what it was made from and filled with, never run."""

    __slots__ = ("arguments", "state")

    def __new__(cls, *arguments: object) -> _Record:
        record = object.__new__(cls)
        record.arguments = arguments
        record.state = None
        return record

    arguments: tuple[object, ...]
    state: object

    def __setstate__(self, state: object) -> None:
        self.state = state


class _Metadata(_Record):
    __slots__ = ()


class _Tensor(_Record):
    __slots__ = ()


class _Bytes(_Record):
    __slots__ = ()


class _Chunk(_Record):
    __slots__ = ()


class _Index(_Record):
    __slots__ = ()


class _Properties(_Record):
    __slots__ = ()


class _Place(_Record):
    __slots__ = ()


def _size(numbers: object = ()) -> tuple[int, ...]:
    """What stands for `torch.Size`: no tuple of anything else, so that it holds none."""
    if not isinstance(numbers, tuple | list) or len(numbers) > _MOST_DIMENSIONS:
        raise pickle.UnpicklingError("a size is no row of numbers")
    if not all(type(each) is int for each in numbers):
        raise pickle.UnpicklingError("a size is no row of numbers")
    return tuple(numbers)


_MOST_DIMENSIONS = 64
_CHECKPOINT = "torch.distributed.checkpoint"
_SHARDED = "torch.distributed._shard.sharded_tensor.metadata"  # of torch before 2.3
_MEGATRON = "megatron.core.dist_checkpointing.strategies.torch"
_ALLOWED: dict[tuple[str, str], object] = {
    (f"{_CHECKPOINT}.metadata", "Metadata"): _Metadata,
    (f"{_CHECKPOINT}.metadata", "TensorStorageMetadata"): _Tensor,
    (f"{_CHECKPOINT}.metadata", "BytesStorageMetadata"): _Bytes,
    (f"{_CHECKPOINT}.metadata", "ChunkStorageMetadata"): _Chunk,
    (f"{_CHECKPOINT}.metadata", "MetadataIndex"): _Index,
    (f"{_CHECKPOINT}.metadata", "TensorProperties"): _Properties,
    (f"{_CHECKPOINT}.metadata", "_MEM_FORMAT_ENCODING"): _Record,
    (f"{_CHECKPOINT}.metadata", "StorageMeta"): _Record,
    (f"{_CHECKPOINT}.filesystem", "_StorageInfo"): _Place,
    # What each rank was to write, which Megatron keeps as well.
    (f"{_CHECKPOINT}.planner", "SavePlan"): _Record,
    (f"{_CHECKPOINT}.planner", "TensorWriteData"): _Record,
    (f"{_CHECKPOINT}.planner", "WriteItem"): _Record,
    (f"{_CHECKPOINT}.planner", "WriteItemType"): _Record,
    (_SHARDED, "TensorProperties"): _Properties,
    (_SHARDED, "MEM_FORMAT_ENCODING"): _Record,
    (_MEGATRON, "MCoreMetadata"): _Metadata,
    (_MEGATRON, "MCoreSavePlan"): _Record,
    ("torch", "Size"): _size,
    ("torch.serialization", "_get_layout"): _Record,
    ("collections", "OrderedDict"): dict,
    **{
        (module, name): _Record
        for module in ("pathlib", "pathlib._local")  # the latter in Python 3.13
        for name in ("PosixPath", "WindowsPath")
    },
}
# Some dtypes cannot be compared here; they are no reason to refuse what is beside them.
_DTYPE = re.compile(r"bool|(?:bfloat|float|complex|q?u?int|bits)\d\w*", re.ASCII)


class _Unpickler(pickle.Unpickler):
    def __init__(self, raw: bytes, path: Path) -> None:
        super().__init__(io.BytesIO(raw))
        self._path = path

    def find_class(self, module: str, name: str) -> object:
        if module == "torch" and _DTYPE.fullmatch(name):
            return name
        try:
            return _ALLOWED[module, name]
        except KeyError:
            raise CheckpointError(
                f"refusing to unpickle {safe(self._path)}: it needs "
                f"`{short(f'{module}.{name}')}`, which says nothing of a checkpoint's tensors; "
                "save it again with torch.distributed.checkpoint, or as safetensors"
            ) from None

    def persistent_load(self, _saved: object) -> NoReturn:
        raise pickle.UnpicklingError("it refers to data outside of it")


def read_metadata(path: Path, is_wanted: Callable[[str, Keys], bool]) -> Description:
    """What the `.metadata` file `path` says of the tensors that are wanted.

    Args:
        path: the file.
        is_wanted: called with the name of each tensor and with where it was in the state dict that
            was saved (empty where that is not said); what is not wanted is not looked at further.

    Raises:
        CheckpointError: it is unsafe, damaged, or its chunks don't make up the tensors.
    """
    import xxhash

    try:
        raw = path.read_bytes()
    except OSError as error:
        raise unreadable(path, error) from error
    refuse_pointer(path, raw)
    try:
        look_over(raw)
        loaded: object = _Unpickler(raw, path).load()
    except CheckpointError:
        raise
    except HeavyTupleError:
        raise CheckpointError(
            f"refusing to unpickle {safe(path)}: tuples are nested in it so that to look at one "
            "could take for ever, which torch does not write; save it again with "
            "torch.distributed.checkpoint, or as safetensors"
        ) from None
    except Exception as error:
        # A damaged byte can lead pickle to any exception there is.
        broken(path, f"it is no pickle of metadata ({short(error) or type(error).__name__})")
    metadata = _Reader(path)
    if not isinstance(loaded, _Metadata):
        metadata.unexpected("itself", loaded)
    entries = metadata.mapping("state_dict_metadata", metadata.field(loaded, "state_dict_metadata"))
    paths = _paths(metadata.field(loaded, "planner_data"))
    wanted: dict[str, _Tensor] = {}
    others: list[str] = []
    for name, entry in entries.items():
        if not isinstance(name, str):
            metadata.unexpected("a name", name)
        if isinstance(entry, _Tensor) and is_wanted(name, paths.get(name, ())):
            wanted[name] = entry
        elif isinstance(entry, _Tensor):
            others.append(name)
        elif not isinstance(entry, _Bytes):
            metadata.unexpected(name, entry)
    places = _places(metadata, metadata.field(loaded, "storage_data"), wanted)
    tensors = {name: _tensor(metadata, name, entry, places) for name, entry in wanted.items()}
    found = {name: paths[name] for name in tensors if name in paths}
    return Description(tensors, others, found, xxhash.xxh3_128_hexdigest(raw))


def _paths(planner_data: object) -> dict[str, Keys]:
    """Where in the state dict each name was: what torch notes when it flattens one.

    It is left out by other planners, and then nothing is known; what cannot be one is ignored.
    """
    if not isinstance(planner_data, dict):
        return {}
    return {
        name: tuple(map(str, path))
        for name, path in planner_data.items()
        if isinstance(path, tuple)
        and all(isinstance(part, str) or (type(part) is int and abs(part) < 2**63) for part in path)
        and name == ".".join(map(str, path))
    }


_Places = dict[tuple[str, tuple[int, ...]], _Place]


def _places(metadata: _Reader, storage_data: object, wanted: Mapping[str, object]) -> _Places:
    places: _Places = {}
    for index, place in metadata.mapping("storage_data", storage_data).items():
        name = metadata.field(index, "fqn") if isinstance(index, _Index) else None
        if not isinstance(name, str) or not isinstance(place, _Place):
            metadata.unexpected("storage_data", index if name is None else place)
        offset = metadata.field(index, "offset")
        if name in wanted and offset is not None:
            places[name, metadata.integers(name, offset)] = place
    return places


def _tensor(metadata: _Reader, name: str, entry: _Tensor, places: _Places) -> StoredTensor:
    properties = metadata.field(entry, "properties")
    state = properties.state if isinstance(properties, _Properties) else None
    dtype = state[0] if isinstance(state, tuple) and state else None
    if not isinstance(dtype, str):
        metadata.unexpected(name, properties)
    if dtype not in DTYPES:
        metadata.refuse(f"stores {short(name)} as {short(dtype)}, which cannot be compared")
    shape = metadata.integers(name, metadata.field(entry, "size"))
    chunks = metadata.field(entry, "chunks")
    if not isinstance(chunks, list):
        metadata.unexpected(name, chunks)
    # Uneven shards leave ranks without rows; older versions list what several ranks hold twice.
    boxes = dict.fromkeys(_box(metadata, name, chunk, shape) for chunk in chunks)
    stored = [box for box in boxes if math.prod(box.sizes)]
    fault = fault_in_cover(shape, stored)
    if fault is not None:
        metadata.refuse(
            f"lists chunks of {short(name)} {list(shape)} that don't make it up: {fault}"
        )
    itemsize = DTYPES[dtype].itemsize
    found = (_chunk(metadata, name, box, itemsize, places) for box in stored)
    return StoredTensor(dtype, shape, tuple(found))


def _box(metadata: _Reader, name: str, chunk: object, shape: tuple[int, ...]) -> Box:
    if not isinstance(chunk, _Chunk):
        metadata.unexpected(name, chunk)
    box = Box(
        metadata.integers(name, metadata.field(chunk, "offsets")),
        metadata.integers(name, metadata.field(chunk, "sizes")),
    )
    if not len(box.offsets) == len(box.sizes) == len(shape):
        metadata.refuse(
            f"lists a chunk of {short(name)} {list(shape)} with {len(box.sizes)} dimensions at "
            f"{list(box.offsets)}"
        )
    return box


def _chunk(metadata: _Reader, name: str, box: Box, itemsize: int, places: _Places) -> Chunk:
    place = places.get((name, box.offsets))
    if place is None:
        metadata.refuse(
            f"lists a chunk of {short(name)} at {list(box.offsets)}, but no file that holds it"
        )
    file = metadata.field(place, "relative_path")
    if not isinstance(file, str) or not _is_plain(file):
        raise CheckpointError(
            f"{safe(metadata.path)} points outside its directory: {short(name)} in {_told(file)}; "
            "a chunk is in a file beside it, this checkpoint was not written by a trainer"
        )
    transforms = metadata.field(place, "transform_descriptors")
    if transforms:
        listed = transforms if isinstance(transforms, list | tuple) else [transforms]
        raise CheckpointError(
            f"{safe(metadata.path)} stores {short(name)} through the extension "
            f"{first_few([_told(each) for each in listed])}, which cannot be read; save the "
            "checkpoint without extensions"
        )
    start, nbytes = metadata.integers(
        name, (metadata.field(place, "offset"), metadata.field(place, "length"))
    )
    needed = math.prod(box.sizes) * itemsize
    if nbytes < needed:
        metadata.refuse(f"gives {nbytes:,} bytes to a chunk of {short(name)} that takes {needed:,}")
    return Chunk(box, file, start, nbytes)


def _told(value: object) -> str:
    """A text of the file; what is none is not spelled out, it could be nested without an end."""
    return short(value) if isinstance(value, str) else type(value).__name__.lstrip("_")


def _is_plain(file: str) -> bool:
    return bool(file) and file not in (".", "..") and not any(char in file for char in "/\\:\0")


class _Reader:
    """Takes records apart, and says of which file when they are not what torch writes."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def field(self, record: object, name: str) -> object:
        """A field of a record; None where it has none, as torch leaves out what is empty."""
        state = record.state if isinstance(record, _Record) else None
        if state is None:
            return None
        if not isinstance(state, dict):
            self.unexpected(name, state)
        return state.get(name)

    def mapping(self, what: str, value: object) -> dict[object, object]:
        if not isinstance(value, dict):
            self.unexpected(what, value)
        return value

    def integers(self, what: str, value: object) -> tuple[int, ...]:
        """Sizes or offsets: no sizes below zero."""
        if not isinstance(value, tuple) or not all(
            type(each) is int and 0 <= each < 2**63 for each in value
        ):
            self.unexpected(what, value)
        return value

    def unexpected(self, what: str, value: object) -> NoReturn:
        kind = type(value).__name__.lstrip("_")
        broken(self.path, f"of {short(what)} it says what torch does not write ({kind})")

    def refuse(self, what: str) -> NoReturn:
        raise CheckpointError(f"{safe(self.path)} {what}; save the checkpoint again")
