"""The header of one safetensors file, read and checked without the library.

The library does not tell where a tensor's bytes lie, takes the last of two equal names, and
reports each fault in words that name neither file nor tensor. What it refuses is refused here too.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, NamedTuple, NoReturn

from pytest_subnet.checkpoints.base import TensorInfo
from pytest_subnet.checkpoints.dtypes import BY_CODE
from pytest_subnet.checkpoints.files import FileStamp, stamp, unreadable
from pytest_subnet.errors import CheckpointError
from pytest_subnet.text import safe

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

_LARGEST_HEADER = 100_000_000  # the limit of the format's own library
_SUB_BYTE = ("F4", "F6_E2M3", "F6_E3M2")


class Header(NamedTuple):
    """The tensors of one file, in the order of their bytes, and where each one starts."""

    stamp: FileStamp
    tensors: Mapping[str, tuple[TensorInfo, int]]
    digest: str


def read_header(path: Path) -> Header:
    """Read and check the header of the safetensors file `path`; the data stays unread.

    Raises:
        CheckpointError: the file cannot be read, or is not whole and consistent.
    """
    import xxhash

    before = stamp(path)
    try:
        with open(path, "rb") as file:
            length = _header_length(path, file.read(8), before.size)
            raw = file.read(length)
    except OSError as error:
        raise unreadable(path, error) from error
    if len(raw) != length:
        _broken(path, "it shrank while its header was read")
    entries = _parse(path, raw)
    data = before.size - 8 - length
    tensors = _checked(path, entries, data_start=8 + length, data_bytes=data)
    return Header(before, tensors, xxhash.xxh3_128_hexdigest(raw))


def _header_length(path: Path, head: bytes, file_size: int) -> int:
    if head == b"version ":
        raise CheckpointError(
            f"{safe(path)} is a Git LFS pointer, not weights; run `git lfs pull` in its repository"
        )
    if len(head) < 8:
        _broken(path, f"it has only {file_size} bytes")
    length = int.from_bytes(head, "little")
    if length > _LARGEST_HEADER:
        raise CheckpointError(
            f"{safe(path)} is not a safetensors file (its first bytes are {head!r}); "
            "was an error page or another format saved under this name?"
        )
    if length > file_size - 8:
        _broken(path, f"its header needs {length:,} bytes, the file has {file_size - 8:,}")
    return length


def _broken(path: Path, what: str) -> NoReturn:
    raise CheckpointError(
        f"{safe(path)} is truncated or corrupt: {what}; save or download it again"
    )


class _DuplicateName(ValueError):
    pass


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    result = dict(pairs)
    if len(result) != len(pairs):
        names = [name for name, _ in pairs]
        raise _DuplicateName(next(name for name in names if names.count(name) > 1))
    return result


def _parse(path: Path, raw: bytes) -> dict[str, object]:
    try:
        entries = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique)
    except _DuplicateName as error:
        raise CheckpointError(
            f"{safe(path)} lists {safe(error)} twice in its header; which one counts cannot be "
            "known, save it again"
        ) from None
    except (ValueError, RecursionError) as error:
        _broken(path, f"its header is not JSON ({safe(error)})")
    if not isinstance(entries, dict):
        _broken(path, "its header is not a JSON object")
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        _broken(path, "its __metadata__ is not a map of strings")
    return entries


def _checked(
    path: Path, entries: dict[str, object], *, data_start: int, data_bytes: int
) -> dict[str, tuple[TensorInfo, int]]:
    spans = sorted((_entry(path, name, entry) for name, entry in entries.items()), key=_span_order)
    tensors = {}
    position = 0
    previous = ""
    for info, start, end in spans:
        if end > data_bytes:
            _broken(
                path,
                f"{safe(info.name)} ends at byte {end:,} of its data, which has {data_bytes:,}",
            )
        if start < position:
            _broken(path, f"the bytes of {safe(info.name)} overlap those of {safe(previous)}")
        if start > position:
            _broken(path, f"{start - position:,} bytes before {safe(info.name)} belong to no tensor")
        tensors[info.name] = (info, data_start + start)
        position, previous = end, info.name
    if position != data_bytes:
        _broken(path, f"its last {data_bytes - position:,} bytes belong to no tensor")
    return tensors


def _span_order(span: tuple[TensorInfo, int, int]) -> tuple[int, int]:
    return span[1], span[2]


def _entry(path: Path, name: str, entry: object) -> tuple[TensorInfo, int, int]:
    match entry:
        case {"dtype": str(code), "shape": list(shape), "data_offsets": [int(start), int(end)]}:
            pass
        case _:
            _broken(path, f"the header entry of {safe(name)} is not dtype, shape and data_offsets")
    if code in _SUB_BYTE:
        raise CheckpointError(
            f"{safe(path)}: {safe(name)} is stored as {code}, less than a byte an entry; "
            "dequantise it first (compressed-tensors and transformers can)"
        )
    dtype = BY_CODE.get(code)
    if dtype is None:
        _broken(path, f"{safe(name)} has the unknown dtype {safe(code)!r}")
    numel = 1
    for length in shape:
        if type(length) is not int or length < 0:
            _broken(path, f"{safe(name)} has the impossible shape {safe(shape)}")
        numel *= length
    nbytes = numel * dtype.itemsize
    if type(start) is not int or type(end) is not int or start < 0 or end - start != nbytes:
        _broken(
            path,
            f"{safe(name)} is {code}{safe(shape)}, {nbytes:,} bytes, "
            f"but its offsets are {safe(start)} to {safe(end)}",
        )
    return TensorInfo(name, tuple(shape), dtype.name, nbytes), start, end
