"""Which entries of a matrix are principal, and which are small: both in blocks of rows.

`principal_mask` and `magnitude_mask` say the same of a whole checkpoint. Here nothing is in memory
beside the matrix as it is stored, its Gram matrix and one bit an entry.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from pytest_subnet.arithmetic import plain_arithmetic
from pytest_subnet.findings.matrices.spectra import scaled
from pytest_subnet.findings.matrices.subspaces import leading

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import torch
    from numpy.typing import NDArray

    Keys = NDArray[np.unsignedinteger]

_ENTRIES = 1 << 20
"""About how many entries are looked at together."""

_BINS = 1 << 16


def row_blocks(shape: tuple[int, int]) -> Iterator[slice]:
    """The rows of a matrix in blocks, of which each but the last ends at a whole byte of bits."""
    rows, columns = shape
    step = max(8, _ENTRIES // columns // 8 * 8)
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


@plain_arithmetic()
def principal_bits(matrix: torch.Tensor, fraction: float, rank: int) -> NDArray[np.uint8]:
    """The entries that carry most of a matrix's leading singular directions.

    Args:
        matrix: `[m, n]`, finite, on any device.
        fraction: of its entries; as many of the largest, by magnitude, of its best approximation of
            rank `rank`.
        rank: from 1 to min(m, n).

    Returns:
        One bit an entry in row order, as `masks.bits` packs them, without padding.
    """
    if rank == min(matrix.shape):
        return _largest(lambda: _magnitudes(matrix), matrix.numel(), fraction)
    within, _ = scaled(matrix.clone()) if matrix.itemsize == 8 else (matrix, 0)
    space = leading(within, rank)
    left = (space.left * (space.values / space.values[0])).float()  # scales nothing out of range
    right = space.right.T.float()

    def keys() -> Iterator[Keys]:
        for rows in row_blocks((matrix.shape[0], matrix.shape[1])):
            block = (left[rows] @ right).abs_()
            yield block.cpu().numpy().reshape(-1).view(np.uint32)

    return _largest(keys, matrix.numel(), fraction)


def low_magnitude_bits(matrix: torch.Tensor, fraction: float) -> NDArray[np.uint8]:
    """The `fraction` of a matrix's entries that are smallest by magnitude; bits as above."""
    return _largest(lambda: (~keys for keys in _magnitudes(matrix)), matrix.numel(), fraction)


def entries_chosen(numel: int, fraction: float) -> int:
    """How many of so many entries a fraction is."""
    return round(fraction * numel)


def words_of(block: torch.Tensor) -> Keys:
    """Rows of a matrix as they are stored, one unsigned word an entry."""
    import torch

    wide = {2: np.uint16, 4: np.uint32, 8: np.uint64}[block.itemsize]
    stored: NDArray[np.uint8] = block.cpu().contiguous().view(torch.uint8).numpy()
    return stored.reshape(-1).view(wide)


def _magnitudes(matrix: torch.Tensor) -> Iterator[Keys]:
    """The words without their signs: of floats, as whole numbers, they are in order of size."""
    for rows in row_blocks((matrix.shape[0], matrix.shape[1])):
        words = words_of(matrix[rows])
        yield words & words.dtype.type(np.iinfo(words.dtype).max >> 1)


def _largest(keys: Callable[[], Iterator[Keys]], numel: int, fraction: float) -> NDArray[np.uint8]:
    """Bits of the largest keys; of equal ones the first.

    Keys are made again for each look at them: by their leading 16 bits, then those that share them
    with the smallest one taken, then all.
    """
    count = entries_chosen(numel, fraction)
    found = np.zeros(_BINS, np.int64)
    for each in keys():
        found += np.bincount(_leading_bits(each), minlength=_BINS)
    reached = np.cumsum(found[::-1])[::-1]  # entries in this bin and above it
    edge = int(np.flatnonzero(reached >= count)[-1])
    beside = [each[_leading_bits(each) == edge] for each in keys()]
    near = np.concatenate(beside)
    wanted = count - int(reached[edge] - found[edge])
    limit = np.partition(near, near.size - wanted)[near.size - wanted]
    ties = wanted - int(np.count_nonzero(near > limit))
    packed = []
    for each in keys():
        flags = each > limit
        equal = np.flatnonzero(each == limit)[:ties]
        flags[equal] = True
        ties -= equal.size
        packed.append(np.packbits(flags, bitorder="little"))
    return np.concatenate(packed)


def _leading_bits(keys: Keys) -> NDArray[np.uint16]:
    return (keys >> keys.dtype.type(8 * keys.itemsize - 16)).astype(np.uint16)
