"""How full the rows and the columns of a mask are."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from pytest_subnet.masks.bits import unpack

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from numpy.typing import NDArray

    from pytest_subnet.masks.update_mask import UpdateMask

    CountColumns = Callable[[NDArray[np.uint64], NDArray[np.int64]], None]

Item = TypeVar("Item", np.uint8, np.uint64)

_WORTH_COMPILING = 1 << 20
"""Entries; below, the compiled code is not worth its import."""


def marginals(mask: UpdateMask, name: str) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """How many entries of one tensor are in each row and in each column.

    Args:
        mask: where the tensor is.
        name: of a tensor with entries and at least one dimension; all but the first are columns.

    Returns:
        Int64 `[rows]` and int64 `[columns]`.
    """
    tensor = mask.info(name)
    width = tensor.numel // tensor.shape[0]
    rows, columns = [np.empty(0, np.int64)], np.zeros(width, np.int64)
    count_columns = _kernel() if tensor.numel >= _WORTH_COMPILING and width % 64 == 0 else None
    if count_columns is None:
        for block in _entries(mask, name, tensor.numel, width):
            of_eight = np.bitwise_count(np.packbits(block, axis=1))  # a third of the time of a sum
            rows.append(of_eight.sum(axis=1, dtype=np.int64))
            for first in range(0, len(block), 255):  # as many as a byte counts
                columns += np.add.reduce(block[first : first + 255], axis=0, dtype=np.uint8)
    else:
        for words in _whole_rows(mask.words(name), width // 64):
            rows.append(np.bitwise_count(words).sum(axis=1, dtype=np.int64))
            count_columns(words, columns)
    return np.concatenate(rows), columns


def _entries(mask: UpdateMask, name: str, numel: int, width: int) -> Iterator[NDArray[np.uint8]]:
    """The entries of a tensor, 0 or 1, in runs of whole rows."""
    left = numel

    def runs() -> Iterator[NDArray[np.uint8]]:
        nonlocal left
        for words in mask.words(name):
            yield unpack(words.view(np.uint8), min(left, words.size * 64)).view(np.uint8)
            left -= words.size * 64

    return _whole_rows(runs(), width)


def _whole_rows(runs: Iterator[NDArray[Item]], width: int) -> Iterator[NDArray[Item]]:
    """The same numbers as `[rows, width]`; what is left of a run goes before the next."""
    rest = None
    for run in runs:
        numbers = run if rest is None else np.concatenate([rest, run])
        whole = numbers.size // width * width
        rest = numbers[whole:] if whole < numbers.size else None
        yield numbers[:whole].reshape(-1, width)


@functools.cache
def _kernel() -> CountColumns | None:
    """The compiled count; None where numba cannot be imported, which the scan has said."""
    try:
        from pytest_subnet.masks.columns_kernel import count_columns
    except ImportError:
        return None
    kernel: CountColumns = count_columns
    return kernel
