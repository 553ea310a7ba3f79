"""Which entries of two buffers are updated: what the kernels count, entry by entry."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from pytest_subnet.checkpoints.dtypes import ARITHMETIC, DTYPES
from pytest_subnet.scan.casts import cast_array

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from pytest_subnet.scan.tolerance import Tolerance

_WORDS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


def updated_entries(
    base: NDArray[np.uint8],
    tuned: NDArray[np.uint8],
    dtype: str,
    tolerances: Sequence[Tolerance],
) -> list[NDArray[np.bool_]]:
    """Which entries are updated under each of `tolerances`.

    Args:
        base: the packed bytes of some entries.
        tuned: likewise, as many.
        dtype: of both; one of at most 8 bytes.
        tolerances: as in `Kernel`, and same bits.

    Returns:
        For each tolerance, bool `[entries]`; some of them may be one array.
    """
    word = _WORDS[DTYPES[dtype].itemsize]
    before, after = base.view(word), tuned.view(word)
    changed = before != after
    wanted = [each for each in tolerances if not each.same_bits and dtype in ARITHMETIC]
    if not wanted:
        return [changed] * len(tolerances)
    # Most entries of a sparse update have the same bits, and those are close under any tolerance.
    where = np.flatnonzero(changed)
    values = _values(before[where], dtype), _values(after[where], dtype)
    beyond = {each: changed.copy() for each in wanted}
    for tolerance, entries in beyond.items():
        entries[where] = _beyond(*values, tolerance)
    return [beyond.get(each, changed) for each in tolerances]


def _values(words: NDArray[np.unsignedinteger], dtype: str) -> NDArray[np.floating]:
    """Words as the floats in which differences are formed."""
    narrow = DTYPES[dtype].itemsize == 2
    wide = cast_array(words.view(np.uint8), dtype, "float32" if narrow else "float64")
    return wide.view(np.float32 if narrow else np.float64)


def _beyond(
    before: NDArray[np.floating], after: NDArray[np.floating], tolerance: Tolerance
) -> NDArray[np.bool_]:
    """Which of some entries with other bits are further apart than `tolerance` allows."""
    number = before.dtype.type
    finite = np.isfinite(before) & np.isfinite(after)
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        if tolerance.rtol is not None:
            allowed = number(tolerance.rtol) * np.maximum(np.abs(before), np.abs(after))
        else:
            allowed = number(tolerance.atol or 0.0)
        return np.asarray(~finite | (np.abs(after - before) > allowed))
