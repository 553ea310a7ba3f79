"""Mask files read back, and not believed before they are checked."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn, TypeGuard

import numpy as np

from pytest_subnet.checkpoints.dtypes import DTYPES
from pytest_subnet.checkpoints.files import FileStamp, read_unchanged, unreadable
from pytest_subnet.checkpoints.header import read_header
from pytest_subnet.checkpoints.json_files import is_text, parse_unique
from pytest_subnet.checkpoints.wording import short
from pytest_subnet.errors import CheckpointError
from pytest_subnet.masks.bits import packed_bytes
from pytest_subnet.masks.saving import BITS, FORMAT, STRATA, VERSION
from pytest_subnet.masks.update_mask import MaskTensor, Origin, Strata, UpdateMask
from pytest_subnet.scan import found
from pytest_subnet.text import safe

if TYPE_CHECKING:
    import os
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from pytest_subnet.checkpoints.base import TensorInfo
    from pytest_subnet.checkpoints.header import Header

_MOST = 2**63 - 1
_MOST_DIMENSIONS = 64  # of an array
_REMEDY = "save the mask again, or copy the file again"
_DTYPES = {*DTYPES, "bool"}


def load(path: str | os.PathLike[str]) -> UpdateMask:
    """As `UpdateMask.load`."""
    file = Path(path).absolute()
    try:
        header = read_header(file)
    except ValueError:
        raise CheckpointError(f"{safe(file)} is no name that a file can have") from None
    metadata = _metadata(file, header)
    tensors = _tensors(file, metadata["tensors"])
    start = _check_bits(file, header, tensors)
    strata = StrataFile(file, header, tensors)
    _check_nothing_else(file, header, tensors)
    origin = Origin(
        short(metadata["what"]),
        short(metadata["tolerance"]),
        short(metadata["base"]),
        short(metadata["tuned"]),
    )
    size = sum(packed_bytes(each.numel) for each in tensors)
    store = FileBits(header.stamp, start, size)
    return UpdateMask(tensors, store, origin, strata, from_file=str(file))


class FileBits:
    """Bits in a file of which nothing is kept in memory."""

    def __init__(self, file: FileStamp, offset: int, nbytes: int) -> None:
        """Those from byte `offset` on."""
        self.nbytes = nbytes
        self._file = file
        self._offset = offset

    def read(self, start: int, nbytes: int) -> NDArray[np.uint8]:
        """As `BitStore.read`; the file must be as it was when its header was read."""
        packed = np.empty(nbytes, np.uint8)
        read_unchanged(self._file, self._offset + start, packed.data)
        return packed

    def __eq__(self, other: object) -> bool:
        """Whether the other ones are those of the same file, by whatever path it was opened."""
        return isinstance(other, FileBits) and self._key() == other._key()

    def __hash__(self) -> int:
        """As `__eq__`."""
        return hash(self._key())

    def _key(self) -> tuple[int, ...]:
        _path, *rest = self._file
        return *rest, self._offset


class StrataFile(Mapping[str, Strata]):
    """Strata by tensor name, read and checked when one is asked for."""

    def __init__(self, path: Path, header: Header, tensors: tuple[MaskTensor, ...]) -> None:
        """Check what the header says of them."""
        self._path = path
        self._stamp = header.stamp
        self._where: dict[str, tuple[MaskTensor, int, int]] = {}
        for tensor in tensors:
            entry = header.tensors.get(STRATA + tensor.name)
            if entry is None:
                continue
            info, offset = entry
            most = found.STRATA.get(tensor.dtype, 0)
            if info.dtype != "int64" or len(info.shape) != 2 or info.shape[0] != 3:
                _corrupt(path, tensor.name, "its strata are not int64 [3, n]")
            if info.shape[1] > most:
                _corrupt(
                    path,
                    tensor.name,
                    f"it has {info.shape[1]:,} strata, {tensor.dtype} has {most or 'none'}",
                )
            self._where[tensor.name] = tensor, offset, info.shape[1]

    def __getitem__(self, name: str) -> Strata:
        """The strata of one tensor."""
        tensor, offset, count = self._where[name]
        table = np.empty((3, count), "<i8")
        if count:
            read_unchanged(self._stamp, offset, table.view(np.uint8).reshape(-1).data)
        which, population, members = table.astype(np.int64, copy=False)
        strata = found.STRATA[tensor.dtype]
        if count and (which[0] < 0 or which[-1] >= strata or (np.diff(which) <= 0).any()):
            _corrupt(self._path, name, f"its strata are not ascending numbers below {strata}")
        if (members < 0).any() or (members > population).any() or (population < 1).any():
            _corrupt(self._path, name, "the counts of its strata cannot be")
        for what, counts, expected in (
            ("entries", population, tensor.numel),
            ("members", members, tensor.entries),
        ):
            summed = sum(counts.tolist())  # whole numbers: int64 could wrap
            if summed != expected:
                _corrupt(
                    self._path, name, f"its strata have {summed:,} {what}, it has {expected:,}"
                )
        dense = Strata(np.zeros(strata, np.int64), np.zeros(strata, np.int64))
        dense.population[which] = population
        dense.members[which] = members
        return dense

    def __iter__(self) -> Iterator[str]:
        """Names of tensors that have strata."""
        return iter(self._where)

    def __len__(self) -> int:
        """How many have."""
        return len(self._where)


def _metadata(path: Path, header: Header) -> dict[str, str]:
    import xxhash

    try:
        with open(path, "rb") as file:
            raw = file.read(int.from_bytes(file.read(8), "little"))
    except OSError as error:
        raise unreadable(path, error) from error
    if xxhash.xxh3_128_hexdigest(raw) != header.digest:
        raise CheckpointError(f"{safe(path)} changed while it was opened; open it again")
    entries = parse_unique(raw)  # read_header has parsed the same bytes
    metadata = entries.get("__metadata__") if isinstance(entries, dict) else None
    if not isinstance(metadata, dict) or metadata.get("format") != FORMAT:
        raise CheckpointError(
            f"{safe(path)} is no mask file; pass one that UpdateMask.save wrote, or make a mask of "
            "a pair of checkpoints with update_mask"
        )
    if metadata.get("version") != VERSION:
        raise CheckpointError(
            f"{safe(path)} is a mask file of version {short(metadata.get('version'))}, this "
            f"pytest-subnet reads version {VERSION}; install the one that wrote it, or save the "
            "mask again"
        )
    wanted = ("what", "tolerance", "base", "tuned", "tensors")
    missing = [key for key in wanted if key not in metadata]
    if missing:
        raise CheckpointError(
            f"{safe(path)} is corrupt: its header lacks {', '.join(missing)}; {_REMEDY}"
        )
    return metadata


def _tensors(path: Path, text: str) -> tuple[MaskTensor, ...]:
    try:
        listed = parse_unique(text.encode())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{safe(path)} is corrupt: its list of tensors is not JSON ({short(error)}); {_REMEDY}"
        ) from None
    if not isinstance(listed, list):
        raise CheckpointError(f"{safe(path)} is corrupt: it has no list of tensors; {_REMEDY}")
    tensors: dict[str, MaskTensor] = {}
    for item in listed:
        match item:
            case [str(name), list(shape), str(dtype), entries] if is_text(name):
                pass
            case _:
                raise CheckpointError(
                    f"{safe(path)} is corrupt: {short(item)} in its list of tensors is not name, "
                    f"shape, dtype and count; {_REMEDY}"
                )
        if len(shape) > _MOST_DIMENSIONS:
            _corrupt(path, name, f"it has {len(shape):,} dimensions")
        numel = 1
        for length in shape:
            numel = numel * length if _is_natural(length) else _MOST + 1
            if numel > _MOST:
                _corrupt(path, name, f"it has the impossible shape {short(shape)}")
        if dtype not in _DTYPES:
            _corrupt(path, name, f"it has the unknown dtype {short(dtype)}")
        if not _is_natural(entries) or entries > math.prod(shape):
            _corrupt(path, name, f"{short(entries)} of its {math.prod(shape):,} entries are set")
        if name in tensors:
            _corrupt(path, name, "it is listed twice")
        tensors[name] = MaskTensor(name, tuple(shape), dtype, entries)
    if not tensors:
        raise CheckpointError(f"{safe(path)} is a mask of no tensors; {_REMEDY}")
    return tuple(tensors.values())


def _check_bits(path: Path, header: Header, tensors: tuple[MaskTensor, ...]) -> int:
    """Where the first bits lie; raise unless all of them follow, in the order of the list."""
    first: int | None = None
    at = 0
    for tensor in tensors:
        entry = header.tensors.get(BITS + tensor.name)
        if entry is None:
            _corrupt(path, tensor.name, "it has no bits")
        info, offset = entry
        _check_size(path, tensor, info)
        if first is None:
            first = at = offset
        if offset != at:
            _corrupt(path, tensor.name, "its bits are not in the place that its list gives them")
        at += info.nbytes
    return first or 0


def _check_size(path: Path, tensor: MaskTensor, info: TensorInfo) -> None:
    expected = packed_bytes(tensor.numel)
    if info.dtype != "uint8" or info.shape != (expected,):
        _corrupt(
            path,
            tensor.name,
            f"its bits are {info.dtype}{short(list(info.shape))}, "
            f"{tensor.numel:,} entries need uint8[{expected}]",
        )


def _check_nothing_else(path: Path, header: Header, tensors: tuple[MaskTensor, ...]) -> None:
    known = {prefix + each.name for prefix in (BITS, STRATA) for each in tensors}
    for name in header.tensors:
        if name not in known:
            _corrupt(path, name, "it belongs to no tensor of its list")


def _is_natural(value: object) -> TypeGuard[int]:
    return type(value) is int and 0 <= value <= _MOST


def _corrupt(path: Path, name: str, what: str) -> NoReturn:
    raise CheckpointError(f"{safe(path)} is corrupt: of {short(name)}, {what}; {_REMEDY}")
