"""Masks as files: safetensors, so that any reader of the format can open one.

Tensor `bits:NAME` is uint8 `[bytes]`: entry `i` of NAME in row order is bit `i % 8` of byte
`i // 8`, padded with zeros to a multiple of 8 bytes. Tensor `strata:NAME`, where the base is known
and stored in 16 bits, is int64 `[3, strata that occur]`: which stratum, its entries, those in the
mask. What they belong to is in the header's metadata.
"""

from __future__ import annotations

import json
import os
import secrets
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pytest_subnet.checkpoints.json_files import is_text
from pytest_subnet.errors import CheckpointError
from pytest_subnet.masks.bits import packed_bytes
from pytest_subnet.text import safe

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import BinaryIO

    from numpy.typing import NDArray

    from pytest_subnet.masks.update_mask import Strata, UpdateMask

FORMAT = "pytest-subnet mask"
VERSION = "1"
BITS = "bits:"
STRATA = "strata:"


def save(mask: UpdateMask, path: str | os.PathLike[str]) -> None:
    """As `UpdateMask.save`."""
    target = Path(path)
    metadata = _metadata(mask)  # first of all: taking fingerprints can fail
    try:
        partial = target.with_name(f".{secrets.token_hex(8)}.partial")
        try:
            with open(partial, "xb") as file:
                _write(mask, metadata, file)
                file.flush()
                os.fsync(file.fileno())  # the name must not outlive the bytes in a power cut
            partial.replace(target)
        finally:
            partial.unlink(missing_ok=True)
    except (OSError, ValueError) as error:  # ValueError: a null byte in the path
        raise CheckpointError(
            f"cannot write the mask to {safe(target)}: "
            f"{getattr(error, 'strerror', None) or error}; give a path in a directory that is "
            "there, can be written to and has room"
        ) from error


def _metadata(mask: UpdateMask) -> dict[str, str]:
    for tensor in mask.tensors:
        if not is_text(tensor.name):
            raise CheckpointError(
                f"cannot write the mask: the name {safe(tensor.name)} is not valid Unicode; "
                "rename the tensor"
            )
    tensors = [[each.name, list(each.shape), each.dtype, each.entries] for each in mask.tensors]
    return {
        "format": FORMAT,
        "version": VERSION,
        "what": mask.origin.what,
        "tolerance": mask.origin.tolerance,
        "base": mask.origin.base,
        "tuned": mask.origin.tuned,
        "tensors": json.dumps(tensors),
    }


def _write(mask: UpdateMask, metadata: dict[str, str], file: BinaryIO) -> None:
    header: dict[str, object] = {"__metadata__": metadata}
    end = 0
    for tensor in mask.tensors:
        start, end = end, end + packed_bytes(tensor.numel)
        header[BITS + tensor.name] = _entry("U8", [end - start], start, end)
    for name, strata in _strata_of(mask):
        table = table_of(strata)
        start, end = end, end + table.nbytes
        header[STRATA + name] = _entry("I64", list(table.shape), start, end)
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    file.write(len(raw).to_bytes(8, "little") + raw)
    for tensor in mask.tensors:
        for words in mask.words(tensor.name):
            file.write(words.astype("<u8", copy=False).data)
    for _, strata in _strata_of(mask):
        file.write(table_of(strata).astype("<i8", copy=False).data)


def _strata_of(mask: UpdateMask) -> Iterator[tuple[str, Strata]]:
    """One at a time: those of many thousand tensors are large together."""
    for name in mask.names():
        strata = mask.strata(name)
        if strata is not None:
            yield name, strata


def table_of(strata: Strata) -> NDArray[np.int64]:
    """Int64 `[3, strata that occur]`: which, entries, members."""
    which = np.flatnonzero(strata.population)
    return np.stack([which, strata.population[which], strata.members[which]])


def _entry(code: str, shape: list[int], start: int, end: int) -> dict[str, object]:
    return {"dtype": code, "shape": shape, "data_offsets": [start, end]}
