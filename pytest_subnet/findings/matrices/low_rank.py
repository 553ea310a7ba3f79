"""Counting the singular values above a limit, of a matrix that may have few of them.

A random sketch finds the few (Halko, Martinsson and Tropp, arXiv 0909.4061). That they are all is
not taken on trust: what is left beyond them is measured, and only if its largest singular value is
below the limit is the count given. Otherwise all are counted, from the Gram matrix.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

from pytest_subnet.arithmetic import plain_arithmetic
from pytest_subnet.findings.matrices.spectra import Spectrum

if TYPE_CHECKING:
    import torch

_BEYOND = 10
"""Columns of the sketch beyond the rank that is expected."""

_STEPS = 16
_SHORT = 0.6
"""Lanczos' estimate of the largest eigenvalue, after as many steps, is at least this share of it.

It fails with probability 1.648 √n exp(-√0.4 (2 · 16 - 1)), a millionth for n = 40,000 (Kuczyński
and Woźniakowski 1992, theorem 4.2).
"""


class Counted(NamedTuple):
    """How many singular values are above a limit.

    Attributes:
        above: how many, exactly.
        leading: the largest of them, largest first, as far as they were computed.
        method: `"sketch"` or `"gram"`.
    """

    above: int
    leading: tuple[float, ...]
    method: str


@plain_arithmetic()
def count_above(matrix: torch.Tensor, limit: float, *, expected: int) -> Counted:
    """How many singular values of `matrix` are greater than `limit`.

    Args:
        matrix: `[m, n]`, finite, float32 or float64, on any device.
        limit: above 0.
        expected: about how many; more take the longer way.
    """
    found = _from_sketch(matrix, limit, expected + _BEYOND)
    if found is not None:
        return found
    spectrum = Spectrum(matrix)
    count = spectrum.count_above(limit)
    return Counted(count, (spectrum.largest(),) if count else (), "gram")


def _from_sketch(matrix: torch.Tensor, limit: float, columns: int) -> Counted | None:
    """The count, where it is no more than a sketch of as many columns can show."""
    import torch

    if columns >= min(matrix.shape) // 2:
        return None
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(matrix.shape[1], columns, generator=generator, dtype=matrix.dtype)
    basis = _orthonormal(matrix @ start.to(matrix.device))
    basis = _orthonormal(matrix @ _orthonormal(matrix.T @ basis))
    left, values, right = torch.linalg.svd(basis.T @ matrix, full_matrices=False)
    count = int((values > limit).sum())
    if count == columns:
        return None
    kept = (basis @ left[:, :count]) * values[:count], right[:count]
    if _norm_at_most(matrix, kept) > limit:
        return None
    return Counted(count, tuple(values[: max(count, 1)].tolist()), "sketch")


def _orthonormal(matrix: torch.Tensor) -> torch.Tensor:
    import torch

    basis: torch.Tensor = torch.linalg.qr(matrix).Q
    return basis


def _norm_at_most(matrix: torch.Tensor, kept: tuple[torch.Tensor, torch.Tensor]) -> float:
    """An upper bound of the largest singular value of `matrix - kept[0] @ kept[1]`.

    By Lanczos on the square, with all its vectors kept orthogonal, and the share that it may be
    short by.
    """
    import torch

    generator = torch.Generator().manual_seed(1)
    vector = torch.randn(matrix.shape[1], generator=generator, dtype=matrix.dtype)
    vector = vector.to(matrix.device)
    basis = [vector / vector.norm()]
    diagonal: list[float] = []
    beside: list[float] = []
    for _ in range(min(_STEPS, matrix.shape[1])):
        after = matrix @ basis[-1] - kept[0] @ (kept[1] @ basis[-1])
        after = matrix.T @ after - kept[1].T @ (kept[0].T @ after)
        diagonal.append(float(after @ basis[-1]))
        known = torch.stack(basis, dim=1)
        for _ in range(2):  # twice is enough
            after = after - known @ (known.T @ after)
        beside.append(float(after.norm()))
        if beside[-1] <= 1e-12 * max(max(diagonal), 1e-300):
            break
        basis.append(after / beside[-1])
    from scipy.linalg import eigvalsh_tridiagonal

    largest = float(eigvalsh_tridiagonal(diagonal, beside[: len(diagonal) - 1])[-1])
    return math.sqrt(max(largest, 0.0) / _SHORT)
