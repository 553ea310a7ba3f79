"""Chunks of a torch distributed checkpoint: each is what `torch.save` wrote, inside a larger file.

Where its numbers lie is read off the directory of that zip file and off the few bytes of its
pickle, without loading it. What is laid out in any other way is left to torch.
"""

from __future__ import annotations

import io
import math
import pickle
import re
import sys
import zipfile
from typing import TYPE_CHECKING, NamedTuple, NoReturn

from pytest_subnet.checkpoints.dcp.boxes import strides_of
from pytest_subnet.checkpoints.dtypes import DTYPES
from pytest_subnet.checkpoints.wording import broken, short
from pytest_subnet.errors import CheckpointError
from pytest_subnet.held import without_warnings
from pytest_subnet.text import safe, spell_tensor

if TYPE_CHECKING:
    import numpy as np
    from _typeshed import WriteableBuffer
    from numpy.typing import NDArray

    from pytest_subnet.checkpoints.dcp.metadata import Chunk
    from pytest_subnet.checkpoints.files import FileReader

_READ_WHOLE = 32 * 1024
_LOCAL_HEADER = 30
_GAPS = (0, 12, 16, 20, 24)  # after the data of a record: nothing, or its length and checksum
_ALIGNMENT = 64  # of that data, before torch wrote it down
_STORAGES = {
    "BFloat16Storage": "bfloat16",
    "HalfStorage": "float16",
    "FloatStorage": "float32",
    "DoubleStorage": "float64",
    "CharStorage": "int8",
    "ShortStorage": "int16",
    "IntStorage": "int32",
    "LongStorage": "int64",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
    "ComplexFloatStorage": "complex64",
    "ComplexDoubleStorage": "complex128",
}


class _Slice(io.RawIOBase):
    """A part of a file as a file of its own."""

    def __init__(self, reader: FileReader, path: str, chunk: Chunk) -> None:
        self._reader = reader
        self._path = path
        self._start = chunk.start
        self._nbytes = chunk.nbytes
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        origin = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._nbytes}[whence]
        if origin + offset < 0:
            raise OSError("seek to before the start")  # what zipfile expects of a short file
        self._position = origin + offset
        return self._position

    def readinto(self, buffer: WriteableBuffer) -> int:
        with memoryview(buffer) as view, view.cast("B") as room:
            count = max(0, min(len(room), self._nbytes - self._position))
            self._reader.read_into(self._path, self._start + self._position, room[:count])
        self._position += count
        return count


def locate(reader: FileReader, path: str, chunk: Chunk, dtype: str) -> int | None:
    """Where in the file `path` the numbers of `chunk` start, one after the other in row order.

    None where they don't, or where that cannot be told: then `load` has to be asked.
    """
    try:
        return _locate(_opened(reader, path, chunk), path, chunk, dtype)
    except CheckpointError:
        raise
    except Exception:
        # A damaged byte can lead zipfile and pickle to any exception there is; torch will say.
        return None


def _opened(reader: FileReader, path: str, chunk: Chunk) -> _Slice | io.BytesIO:
    """The chunk as a file; a small one is read at once, as many small reads take longer."""
    if chunk.nbytes > _READ_WHOLE:
        return _Slice(reader, path, chunk)
    raw = bytearray(chunk.nbytes)
    reader.read_into(path, chunk.start, memoryview(raw))
    return io.BytesIO(raw)


def _locate(file: _Slice | io.BytesIO, path: str, chunk: Chunk, dtype: str) -> int | None:
    with zipfile.ZipFile(file) as archive:
        listed = archive.infolist()
        directory = archive.start_dir
    records = {record.filename.partition("/")[2]: record for record in listed}
    if any(record.compress_type for record in listed):
        broken(path, "it was compressed after it was saved")
    if len(records) != len(listed):
        return None  # readers differ in which of two records of one name counts
    order = records.get("byteorder")
    if (_content(file, order) if order else sys.byteorder.encode()) != b"little":
        return None
    stored = _Arguments(io.BytesIO(_content(file, records["data.pkl"]))).load()
    if not isinstance(stored, _Stored) or not stored.is_packed(dtype, chunk.box.sizes):
        return None
    data = records[f"data/{stored.storage.key}"]
    offset = _offset(file, data)
    needed = math.prod(chunk.box.sizes) * DTYPES[dtype].itemsize
    following = (each.header_offset for each in listed if each.header_offset > data.header_offset)
    gap = min(following, default=directory) - offset - data.file_size
    aligned = records.get(".storage_alignment")
    alignment = int(_content(file, aligned)) if aligned else _ALIGNMENT
    if offset % alignment or gap not in _GAPS:
        # A damaged length shifts the data; torch would read it all the same.
        broken(_spell(path, chunk), "its data is not where torch.save puts it")
    return chunk.start + offset if data.file_size >= needed else None


def _offset(file: _Slice | io.BytesIO, record: zipfile.ZipInfo) -> int:
    """Where the content of a record starts."""
    file.seek(record.header_offset)
    header = file.read(_LOCAL_HEADER)
    if header[:4] != b"PK\x03\x04":
        raise zipfile.BadZipFile("no record where the directory lists one")
    name, extra = (int.from_bytes(header[at : at + 2], "little") for at in (26, 28))
    return record.header_offset + _LOCAL_HEADER + name + extra


def _content(file: _Slice | io.BytesIO, record: zipfile.ZipInfo) -> bytes:
    """What is in a record: that of a pickle of one tensor takes some hundred bytes."""
    file.seek(_offset(file, record))
    return file.read(min(record.file_size, _READ_WHOLE))


def _spell(path: str, chunk: Chunk) -> str:
    return f"{path} from byte {chunk.start:,} on"


class _Storage(NamedTuple):
    dtype: str
    key: str


class _Stored(NamedTuple):
    """With what a pickle would have torch build a tensor."""

    storage: _Storage
    dtype: str
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]

    def is_packed(self, dtype: str, size: tuple[int, ...]) -> bool:
        """Whether it is `size` entries of `dtype`, in row order from the start of the storage."""
        packed = zip(self.size, self.stride, strides_of(self.size), strict=True)
        return (self.dtype, self.offset, self.size) == (dtype, 0, size) and all(
            extent == 1 or stride == row for extent, stride, row in packed
        )


def _rebuild_v2(
    storage: _Storage, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: object
) -> _Stored:
    if len(_) != 2:
        raise pickle.UnpicklingError("conjugate, negative, or of another version")
    return _Stored(storage, storage.dtype, offset, size, stride)


def _rebuild_v3(
    storage: _Storage, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *rest: object
) -> _Stored:
    if len(rest) != 3 or not isinstance(rest[2], str):
        raise pickle.UnpicklingError("conjugate, negative, or of another version")
    return _Stored(storage, rest[2], offset, size, stride)


class _Arguments(pickle.Unpickler):
    """Reads the pickle of one plain tensor; anything else raises."""

    def find_class(self, module: str, name: str) -> object:
        known = {
            ("torch._utils", "_rebuild_tensor_v2"): _rebuild_v2,
            ("torch._utils", "_rebuild_tensor_v3"): _rebuild_v3,
            ("torch.storage", "UntypedStorage"): "uint8",
            ("collections", "OrderedDict"): dict,
        }
        if module == "torch" and (name in DTYPES or name in _STORAGES):
            return _STORAGES.get(name, name)
        return known[module, name]

    def persistent_load(self, saved: object) -> _Storage:
        if not isinstance(saved, tuple) or saved[0] != "storage":
            raise pickle.UnpicklingError("not a storage")
        return _Storage(saved[1], saved[2])


def load(reader: FileReader, path: str, chunk: Chunk, dtype: str, name: str) -> NDArray[np.uint8]:
    """The bytes of a chunk in row order, through torch, which loads it whole.

    Raises:
        CheckpointError: it is not what `.metadata` says, or no plain tensor.
    """
    import torch

    place = _spell(path, chunk)
    try:
        with without_warnings():  # of pickle protocols that it reads all the same
            file = io.BufferedReader(_Slice(reader, path, chunk))
            loaded: object = torch.load(file, map_location="cpu", weights_only=True)
    except CheckpointError:
        raise
    except pickle.UnpicklingError as error:
        _refuse(place, str(error))
    except Exception as error:
        # A damaged byte can lead zipfile and torch to any exception there is.
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        broken(place, short(reason))
    is_plain = type(loaded) in (torch.Tensor, torch.nn.Parameter)
    if not isinstance(loaded, torch.Tensor) or not is_plain or loaded.layout is not torch.strided:
        raise CheckpointError(
            f"{safe(place)} holds {safe(type(loaded).__name__)}, not a plain tensor; save the "
            "checkpoint again"
        )
    found = (str(loaded.dtype).removeprefix("torch."), tuple(loaded.shape))
    if found != (dtype, chunk.box.sizes):
        raise CheckpointError(
            f"{safe(place)} holds {spell_tensor(*found)}, where .metadata lists "
            f"{spell_tensor(dtype, chunk.box.sizes)} of {short(name)}; were two checkpoints mixed?"
        )
    packed = loaded.detach().resolve_conj().resolve_neg().contiguous()
    return packed.reshape(-1).view(torch.uint8).numpy()


def _refuse(place: str, reason: str) -> NoReturn:
    blocked = re.search(r"GLOBAL ([\w.]+)", reason)
    if blocked is None:
        broken(place, "it is not what torch.save writes")
    raise CheckpointError(
        f"refusing to unpickle {safe(place)}: it needs `{short(blocked[1])}`, which is not a "
        "tensor class; a checkpoint holds weights only, save it again as safetensors"
    )
