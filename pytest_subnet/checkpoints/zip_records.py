"""Where in a file that `torch.save` wrote the data of its tensors lies.

A memory-mapped file that is cut short, or that the disk cannot give, ends the process that touches
it. What is known by its offset is read like any other file instead, and a fault is an error with a
name.
"""

from __future__ import annotations

import mmap
import sys
import zipfile
from bisect import bisect_right
from collections import Counter
from typing import TYPE_CHECKING, NamedTuple

from pytest_subnet.checkpoints.wording import broken
from pytest_subnet.errors import CheckpointError
from pytest_subnet.text import safe

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

_LOCAL_HEADER = 30
_DESCRIPTOR = b"PK\x07\x08"
_BETWEEN = (0, 16, 24)
"""Bytes between a record and the next: none, or a descriptor of its sizes."""


class Records(NamedTuple):
    """What the directory of a zip file says of the storages in it.

    Attributes:
        spans: offset and length of each storage that is not empty, in the order of the file.
        native: whether they hold numbers in this machine's byte order.
    """

    spans: list[tuple[int, int]]
    native: bool


def refuse_compressed(path: Path, record: zipfile.ZipInfo) -> None:
    """Raise unless the record lies in the file as `torch.save` leaves it."""
    if record.compress_type != zipfile.ZIP_STORED:
        raise CheckpointError(
            f"{safe(path)} was compressed after it was saved; "
            "unpack it, load it with torch and save it again"
        )


def read_records(path: Path) -> Records:
    """The records of the zip file `path`, none of them read.

    Raises:
        CheckpointError: it is a program or compressed, and cannot be mapped.
        Exception: whatever `zipfile` makes of a damaged file.
    """
    with zipfile.ZipFile(path) as archive, open(path, "rb") as file:
        native, spans = True, []
        listed = archive.infolist()
        starts = sorted([*(record.header_offset for record in listed), archive.start_dir])
        for record in listed:
            part = record.filename.partition("/")[2]
            refuse_compressed(path, record)
            if part == "constants.pkl":
                raise CheckpointError(
                    f"{safe(path)} is a TorchScript program, not weights; "
                    "save the module's state_dict, best as safetensors"
                )
            if part == "byteorder":
                native = archive.read(record).decode("ascii") == sys.byteorder
            if part.startswith("data/") and record.file_size:
                file.seek(record.header_offset)
                header = file.read(_LOCAL_HEADER)
                lengths = (
                    int.from_bytes(header[26:28], "little"),
                    int.from_bytes(header[28:30], "little"),
                )
                offset = record.header_offset + _LOCAL_HEADER + sum(lengths)
                # torch takes the lengths in this header for good; damaged, they shift the data.
                following = starts[bisect_right(starts, record.header_offset)]
                end = offset + record.file_size
                file.seek(end)
                if following - end not in _BETWEEN or (
                    following > end and file.read(len(_DESCRIPTOR)) != _DESCRIPTOR
                ):
                    broken(path, "its data is not where torch.save puts it")
                spans.append((offset, record.file_size))
    return Records(sorted(spans), native)


def mapped_from(path: Path, records: Records, mapped: Mapping[int, int]) -> int:
    """The address to which byte 0 of `path` was mapped.

    Args:
        path: the file.
        records: of that file.
        mapped: address and length of every storage that was mapped from it.

    Raises:
        CheckpointError: the storages that the pickle asks for are not those in the file.
    """
    base = min(mapped, default=0) - min(records.spans, default=(0, 0))[0]
    if sorted((address - base, nbytes) for address, nbytes in mapped.items()) != records.spans:
        broken(path, "its list of tensors and the data stored with it disagree")
    return base


def mapped_from_some(path: Path, records: Records, mapped: Mapping[int, int]) -> int | None:
    """As `mapped_from`, where the file holds storages that are not among `mapped`.

    Returns:
        The address; None where nothing is mapped, or where the storages fit at two addresses.
    """
    if not mapped:
        return None
    spans = set(records.spans)
    lengths = Counter(nbytes for _, nbytes in spans)
    known = min(mapped, key=lambda address: lengths[mapped[address]])
    # The outermost are tried first: moved by one layer of a model, all the others would fit.
    in_turn = [min(mapped), max(mapped), *mapped]
    fitting = [
        base
        for base in (known - offset for offset, nbytes in spans if nbytes == mapped[known])
        if base % mmap.PAGESIZE == 0
        and all((address - base, mapped[address]) in spans for address in in_turn)
    ]
    if not fitting:
        broken(path, "its list of tensors and the data stored with it disagree")
    return fitting[0] if len(fitting) == 1 else None
