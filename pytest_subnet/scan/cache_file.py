"""The file in which the counts of one pair are kept, and what of it is believed."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

import numpy as np
import xxhash

from pytest_subnet.scan.counters import CHANGED, FIRST_TOLERANCE, ZERO_FLIPS, Counters
from pytest_subnet.scan.tally import Tally
from pytest_subnet.scan.tolerance import Tolerance

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

_FIELDS = (("row", "<i8"), ("integers", "<i8", (4,)), ("sums", "<f8", (3,)), ("peak", "<f8"))
_DIGEST_BYTES = 16


def packed(known: Tally, key: str) -> bytes:
    """All that is known, as `unpacked` takes it: a digest, then one table in numpy's format."""
    rows, tolerances = known.scanned, known.tolerances
    counted = known.counters(tolerances)
    table = np.zeros(rows.size, _dtype([_spelt(each) for each in tolerances]))
    table["row"] = rows
    table["integers"] = counted.integers[rows, :FIRST_TOLERANCE]
    table["sums"], table["peak"] = counted.sums[rows], counted.peaks[rows]
    for k, tolerance in enumerate(tolerances):
        table[_spelt(tolerance)] = counted.integers[rows, FIRST_TOLERANCE + k]
    written = io.BytesIO()
    np.lib.format.write_array(written, table, allow_pickle=False)
    return _digest(key, written.getvalue()) + written.getvalue()


def unpacked(data: bytes, key: str, entries: NDArray[np.int64]) -> Tally | None:
    """What a file says of the pair `key`; None for one that is damaged or says what cannot be.

    Args:
        data: what the file holds.
        key: of the pair, and in no other file.
        entries: int64 `[tensors]`: how many entries each tensor of the pair has.
    """
    content = data[_DIGEST_BYTES:]
    if data[:_DIGEST_BYTES] != _digest(key, content):
        return None
    try:
        table = np.lib.format.read_array(io.BytesIO(content), allow_pickle=False)
        names = (table.dtype.names or ())[len(_FIELDS) :]
        tolerances = [_parsed(name) for name in names]
    except (ValueError, OverflowError, MemoryError):  # numpy's for a shape that is made up, too
        return None
    if table.ndim != 1 or table.dtype != _dtype(names) or not _is_possible(table, names, entries):
        return None
    rows, counted = table["row"].astype(np.intp), Counters(entries.size, tolerances)
    counted.integers[rows, :FIRST_TOLERANCE] = table["integers"]
    counted.sums[rows], counted.peaks[rows] = table["sums"], table["peak"]
    for k, name in enumerate(names):
        counted.integers[rows, FIRST_TOLERANCE + k] = table[name]
    known = Tally(entries.size)
    known.keep(rows, counted)
    return known


def packed_size(known: Tally) -> int:
    """About how many bytes `packed` makes of it."""
    return int(known.scanned.size) * _dtype([_spelt(each) for each in known.tolerances]).itemsize


def _is_possible(table: np.ndarray, names: Sequence[str], entries: NDArray[np.int64]) -> bool:
    """Whether these could be counts of tensors with so many entries."""
    rows = table["row"]
    if rows.size and (rows[0] < 0 or rows[-1] >= entries.size or (np.diff(rows) <= 0).any()):
        return False
    most, integers = entries[rows], table["integers"]
    changed = integers[:, CHANGED]
    beyond = [table[name] for name in names]
    return bool(
        (integers >= 0).all()
        and (integers <= most[:, None]).all()
        and (integers[:, ZERO_FLIPS] <= changed).all()
        and all((each >= -1).all() and (each <= changed).all() for each in beyond)
        and (table["sums"] >= 0).all()  # NaN is not
        and (table["peak"] >= 0).all()
    )


def _dtype(names: Sequence[str]) -> np.dtype[np.void]:
    return np.dtype([*_FIELDS, *((name, "<i8") for name in names)])


def _spelt(tolerance: Tolerance) -> str:
    if tolerance.rtol is None:
        return f"atol={float(tolerance.atol or 0.0)!r}"
    return f"rtol={float(tolerance.rtol)!r}"


def _parsed(name: str) -> Tolerance:
    kind, _, value = name.partition("=")
    if kind not in ("atol", "rtol"):
        raise ValueError(f"{name!r} is no tolerance")
    return Tolerance(**{kind: float(value)})


def _digest(key: str, content: bytes) -> bytes:
    return xxhash.xxh3_128_digest(key.encode("ascii") + content)
