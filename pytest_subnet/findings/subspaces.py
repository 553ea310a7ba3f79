"""The leading singular subspaces of a matrix, and the angles between two of them.

Everything is float64: angles of interest are within ten times of what float32 resolves.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

from pytest_subnet.findings import block_krylov
from pytest_subnet.findings.spectra import gram_of

if TYPE_CHECKING:
    import torch

_SMALL = 512
"""Up to this many rows or columns all eigenvectors are computed at once."""

_EPS = 2.0**-52
_COLUMNS = 2048


class Subspace(NamedTuple):
    """The k leading singular directions of a matrix.

    Attributes:
        left: `[m, k]`, orthonormal columns, float64.
        right: `[n, k]`, the same of the right side.
        values: `[k]`, the singular values, largest first.
        beyond: the next one; 0 where there is none.
        error: by how much, in radians, the subspaces may be off; at most π/2.
        method: `"eigh"` or `"block-krylov"`.
    """

    left: torch.Tensor
    right: torch.Tensor
    values: torch.Tensor
    beyond: float
    error: float
    method: str

    @property
    def gap(self) -> float:
        """By how much the k-th value is above the next one, relative to it."""
        last = float(self.values[-1])
        return (last - self.beyond) / last if last else 0.0


def leading(matrix: torch.Tensor, k: int, *, start: Subspace | None = None) -> Subspace:
    """The k leading singular subspaces of `matrix`.

    Args:
        matrix: `[m, n]`, finite, on any device; read in float64, a block at a time.
        k: from 1 to min(m, n).
        start: where to start from, of a matrix nearby. The iteration is believed only when its
            residual says so: it starts at no rotation at all, and stopped too early finds none.
    """
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    gram = gram_of(wide)
    short, values, beyond, error, method = _eigenvectors(gram, k, _short_side(start, matrix))
    long = _project(wide, short, values)
    left, right = (short, long) if wide is matrix else (long, short)
    return Subspace(left, right, values, beyond, error, method)


def _short_side(start: Subspace | None, matrix: torch.Tensor) -> torch.Tensor | None:
    if start is None:
        return None
    return start.left if matrix.shape[0] <= matrix.shape[1] else start.right


def _project(wide: torch.Tensor, short: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """The directions of the long side: Wᵀ U, made orthonormal; of zeros some directions."""
    import torch

    blocks = [
        wide[:, start : start + _COLUMNS].double().T @ short
        for start in range(0, wide.shape[1], _COLUMNS)
    ]
    basis, triangle = torch.linalg.qr(torch.cat(blocks))
    signs = triangle.diagonal().sign()
    signs[signs == 0] = 1
    result: torch.Tensor = basis * signs
    return result


def _eigenvectors(
    gram: torch.Tensor, k: int, start: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, float, float, str]:
    """Leading eigenvectors of a Gram matrix of which the lower triangle is there."""
    wanted = block_krylov.columns(k) * (1 if start is not None else 2)
    if gram.device.type == "cpu" and gram.shape[0] > max(_SMALL, wanted):
        found = _iterate(gram, k, start)
        if found is not None:
            return *found, "block-krylov"
    return *_decompose(gram, k), "eigh"


def _iterate(
    gram: torch.Tensor, k: int, start: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, float, float] | None:
    import torch

    found = block_krylov.eigenvectors(gram.numpy(), k, None if start is None else start.numpy())
    if found is None:
        return None
    vectors = torch.from_numpy(found.vectors[:, :k].copy())
    values = torch.from_numpy(found.squares[: k + 1]).sqrt()
    return vectors, values[:k], float(values[k]), found.error


def _decompose(gram: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor, float, float]:
    import torch

    size = gram.shape[0]
    wanted = min(k + 1, size)
    if gram.device.type == "cpu":
        from scipy.linalg import eigh

        squares, vectors = eigh(gram.numpy(), lower=True, subset_by_index=[size - wanted, size - 1])
        squares, vectors = torch.from_numpy(squares), torch.from_numpy(vectors)
    else:
        squares, vectors = torch.linalg.eigh(gram, UPLO="L")
        squares, vectors = squares[-wanted:], vectors[:, -wanted:]
    squares, vectors = squares.flip(0).clamp(min=0), vectors.flip(1)
    beyond = float(squares[k].sqrt()) if wanted > k else 0.0
    noise = size**0.5 * _EPS * float(squares[0])
    error = block_krylov.angle(noise, float(squares[k - 1]) - beyond**2)
    return vectors[:, :k].contiguous(), squares[:k].sqrt(), beyond, error


def principal_angles_deg(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """The angles between two subspaces in degrees, largest first.

    Below 45° by their sines, above by their cosines (Björck and Golub 1973): the cosine of a small
    angle is 1 in every floating point.

    Args:
        one: `[n, k]`, orthonormal columns, float64.
        other: the same.
    """
    import torch

    inner = one.T @ other
    cosines = torch.linalg.svdvals(inner).clamp(max=1)
    sines = torch.linalg.svdvals(other - one @ inner).clamp(max=1)[: cosines.numel()]
    by_cosine, by_sine = torch.acos(cosines).flip(0), torch.asin(sines)
    angles = torch.where(by_sine < math.pi / 4, by_sine, by_cosine)
    return torch.rad2deg(angles).cpu()


def vector_angles_deg(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """The angle between each column and the same column of the other, in degrees, without sign.

    Means little for vectors of nearly equal singular values: any turn among these is free.
    """
    import torch

    inner = (one * other).sum(dim=0)
    sines = (other - one * inner).norm(dim=0)
    return torch.rad2deg(torch.atan2(sines, inner.abs())).cpu()
