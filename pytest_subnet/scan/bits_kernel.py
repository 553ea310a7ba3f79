"""The kernel for dtypes without arithmetic here: an entry is updated when any of its bits is."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from pytest_subnet.checkpoints.dtypes import DTYPES
from pytest_subnet.scan.counters import CHANGED, FIRST_TOLERANCE, NONFINITE_BASE, NONFINITE_TUNED

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from pytest_subnet.checkpoints.base import Buffer
    from pytest_subnet.scan.counters import Counters

_NOT_FINITE = {
    "float8_e4m3fn": (0x7F, 0xFF),
    "float8_e4m3fnuz": (0x80,),
    "float8_e5m2": (*range(0x7C, 0x80), *range(0xFC, 0x100)),
    "float8_e5m2fnuz": (0x80,),
    "float8_e8m0fnu": (0xFF,),
}
"""The bytes of each 8-bit format that are NaN or Inf."""

_COMPLEX = {"complex64": np.complex64, "complex128": np.complex128}


def compare(
    base: Buffer, tuned: Buffer, dtype: str, bounds: NDArray[np.int64], counters: Counters
) -> None:
    """A `Kernel` for every dtype; no tolerance applies, so each counts what has other bits."""
    left, right = _on_cpu(base), _on_cpu(tuned)
    differs = (left != right).reshape(-1, DTYPES[dtype].itemsize).any(axis=1)
    base_broken, tuned_broken = _not_finite(left, dtype), _not_finite(right, dtype)
    for row, (start, end) in enumerate(pairwise(bounds.tolist())):
        changed = np.count_nonzero(differs[start:end])
        counters.integers[row, CHANGED] += changed
        counters.integers[row, NONFINITE_BASE] += np.count_nonzero(base_broken[start:end])
        counters.integers[row, NONFINITE_TUNED] += np.count_nonzero(tuned_broken[start:end])
        counters.integers[row, FIRST_TOLERANCE:] += changed


def _not_finite(buffer: NDArray[np.uint8], dtype: str) -> NDArray[np.bool_]:
    """Which entries are NaN or Inf; empty for dtypes that have none."""
    if dtype in _COMPLEX:
        return ~np.isfinite(buffer.view(_COMPLEX[dtype]))
    if dtype not in _NOT_FINITE:
        return np.empty(0, np.bool_)
    table = np.zeros(256, np.bool_)
    table[list(_NOT_FINITE[dtype])] = True
    return table[buffer]


def _on_cpu(buffer: Buffer) -> NDArray[np.uint8]:
    return buffer if isinstance(buffer, np.ndarray) else buffer.cpu().numpy()
