"""The kernel for dtypes without arithmetic here: an entry is updated when any of its bits is."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from pytest_subnet.checkpoints.dtypes import DTYPES
from pytest_subnet.scan.counters import CHANGED, FIRST_TOLERANCE

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from pytest_subnet.checkpoints.base import Buffer
    from pytest_subnet.scan.counters import Counters


def compare(
    base: Buffer, tuned: Buffer, dtype: str, bounds: NDArray[np.int64], counters: Counters
) -> None:
    """A `Kernel` for every dtype; no tolerance applies, so each counts what has other bits."""
    itemsize = DTYPES[dtype].itemsize
    differs = (_on_cpu(base) != _on_cpu(tuned)).reshape(-1, itemsize).any(axis=1)
    for row, (start, end) in enumerate(zip(bounds[:-1], bounds[1:], strict=True)):
        changed = np.count_nonzero(differs[start:end])
        counters.integers[row, CHANGED] += changed
        counters.integers[row, FIRST_TOLERANCE:] += changed


def _on_cpu(buffer: Buffer) -> NDArray[np.uint8]:
    return buffer if isinstance(buffer, np.ndarray) else buffer.cpu().numpy()
