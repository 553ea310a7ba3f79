"""The header of one safetensors file, read and checked without the library.

The library does not tell where a tensor's bytes lie, takes the last of two equal names, and
reports each fault in words that name neither file nor tensor. What it refuses is refused here too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, TypeGuard

from pytest_subnet.checkpoints.base import TensorInfo
from pytest_subnet.checkpoints.collector import collector_at_rest
from pytest_subnet.checkpoints.dtypes import BY_CODE
from pytest_subnet.checkpoints.files import FileStamp, refuse_pointer, stamp, unreadable
from pytest_subnet.checkpoints.json_files import DuplicateNameError, is_text, parse_unique
from pytest_subnet.checkpoints.wording import broken, short
from pytest_subnet.errors import CheckpointError
from pytest_subnet.text import safe

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

_LARGEST_HEADER = 100_000_000  # the limit of the format's own library
_LARGEST = 2**63 - 1  # no file is larger
_MOST_DIMENSIONS = 64  # neither torch nor numpy works with more
_SUB_BYTE = ("F4", "F6_E2M3", "F6_E3M2")


class Header(NamedTuple):
    """The tensors of one file, in the order of their bytes, and where each one starts."""

    stamp: FileStamp
    tensors: Mapping[str, tuple[TensorInfo, int]]
    digest: str


@collector_at_rest()
def read_header(path: Path) -> Header:
    """Read and check the header of the safetensors file `path`; the data stays unread.

    Raises:
        CheckpointError: the file cannot be read, or is not whole and consistent.
    """
    import xxhash

    before = stamp(path)
    try:
        with open(path, "rb") as file:
            length = header_length(path, file.read(8), before.size)
            raw = file.read(length)
    except OSError as error:
        raise unreadable(path, error) from error
    if len(raw) != length:
        broken(path, "it shrank while its header was read")
    return Header(before, tensors_in(path, raw, before.size), xxhash.xxh3_128_hexdigest(raw))


def tensors_in(path: Path | str, raw: bytes, file_size: int) -> dict[str, tuple[TensorInfo, int]]:
    """The tensors that the header `raw` of a file lists, and where in the file each one starts."""
    entries = _parse(path, raw)
    start = 8 + len(raw)
    return _checked(path, entries, data_start=start, data_bytes=file_size - start)


def header_length(path: Path | str, head: bytes, file_size: int) -> int:
    """How long the header is, from the first eight bytes of a file."""
    refuse_pointer(path, head)
    if len(head) < 8:
        broken(path, f"it has only {file_size} bytes")
    length = int.from_bytes(head, "little")
    if length > _LARGEST_HEADER:
        raise CheckpointError(
            f"{safe(path)} is not a safetensors file (its first bytes are {head!r}); "
            "was an error page or another format saved under this name?"
        )
    if length > file_size - 8:
        broken(path, f"its header needs {length:,} bytes, the file has {file_size - 8:,}")
    return length


def _parse(path: Path | str, raw: bytes) -> dict[str, object]:
    try:
        entries = parse_unique(raw)
    except DuplicateNameError as error:
        raise CheckpointError(
            f"{safe(path)} lists {short(error)} twice in its header; which one counts cannot be "
            "known, save it again"
        ) from None
    except (ValueError, RecursionError) as error:
        broken(path, f"its header is not JSON ({short(error)})")
    if not isinstance(entries, dict):
        broken(path, "its header is not a JSON object")
    metadata = entries.pop("__metadata__", None)
    if metadata is not None and not _is_map_of_texts(metadata):
        broken(path, "its __metadata__ is not a map of strings")
    return entries


def _is_map_of_texts(value: object) -> bool:
    return isinstance(value, dict) and all(
        isinstance(text, str) and is_text(text) for text in (*value, *value.values())
    )


def _checked(
    path: Path | str, entries: dict[str, object], *, data_start: int, data_bytes: int
) -> dict[str, tuple[TensorInfo, int]]:
    spans = sorted((_entry(path, name, entry) for name, entry in entries.items()), key=_span_order)
    tensors = {}
    position = 0
    previous = ""
    for info, start, end in spans:
        if end > data_bytes:
            broken(
                path,
                f"{short(info.name)} ends at byte {end:,} of its data, which has {data_bytes:,}",
            )
        if start < position:
            broken(path, f"the bytes of {short(info.name)} overlap those of {short(previous)}")
        if start > position:
            broken(
                path, f"{start - position:,} bytes before {short(info.name)} belong to no tensor"
            )
        tensors[info.name] = (info, data_start + start)
        position, previous = end, info.name
    if position != data_bytes:
        broken(path, f"its last {data_bytes - position:,} bytes belong to no tensor")
    return tensors


def _span_order(span: tuple[TensorInfo, int, int]) -> tuple[int, int]:
    return span[1], span[2]


def _entry(path: Path | str, name: str, entry: object) -> tuple[TensorInfo, int, int]:
    if not is_text(name):
        broken(path, f"the name {short(name)} is not valid Unicode")
    match entry:
        # A further field could change what the bytes mean: it is refused, not overlooked.
        case {
            "dtype": str(code),
            "shape": list(shape),
            "data_offsets": [start, end],
            **more,
        } if not more:
            pass
        case _:
            broken(path, f"{short(name)} is not given as exactly dtype, shape and data_offsets")
    if code in _SUB_BYTE:
        raise CheckpointError(
            f"{safe(path)}: {short(name)} is stored as {code}, less than a byte an entry; "
            "dequantise it first (compressed-tensors and transformers can)"
        )
    dtype = BY_CODE.get(code)
    if dtype is None:
        broken(path, f"{short(name)} has the unknown dtype {short(code)!r}")
    if len(shape) > _MOST_DIMENSIONS:
        broken(path, f"{short(name)} has a shape of {len(shape):,} dimensions")
    numel = 1
    for length in shape:
        numel = numel * length if _is_natural(length) else _LARGEST + 1
        if numel > _LARGEST:
            broken(path, f"{short(name)} has the impossible shape {short(shape)}")
    nbytes = numel * dtype.itemsize
    if not _is_natural(start) or not _is_natural(end) or end - start != nbytes:
        broken(
            path,
            f"{short(name)} is {code}{short(shape)}, {nbytes:,} bytes, "
            f"but its offsets are {short(start)} to {short(end)}",
        )
    return TensorInfo(name, tuple(shape), dtype.name, nbytes), start, end


def _is_natural(value: object) -> TypeGuard[int]:
    return type(value) is int and 0 <= value <= _LARGEST  # True is an int too, and no length
