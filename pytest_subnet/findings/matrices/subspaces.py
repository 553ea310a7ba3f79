"""The leading singular subspaces of a matrix, and the angles between two of them.

What is believed was proven in float64: angles of interest are within ten times of what float32
resolves.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

from pytest_subnet.findings.matrices import block_krylov
from pytest_subnet.findings.matrices.spectra import gram_of

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

_SMALL = 512
"""Up to this many rows or columns all eigenvectors are computed at once."""

_LARGE = 2048
"""From here on the products of a Gram matrix are most of the work."""

_EPS = 2.0**-52
_ENTRIES = 1 << 23
"""How many entries are in float64 at a time."""


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
    found = _iterate(wide, k, _short_side(start, matrix)) or _decompose(wide, k)
    if wide is matrix:
        return found
    return found._replace(left=found.right, right=found.left)


def _short_side(start: Subspace | None, matrix: torch.Tensor) -> NDArray[np.float64] | None:
    if start is None:
        return None
    side = start.left if matrix.shape[0] <= matrix.shape[1] else start.right
    found: NDArray[np.float64] = side.cpu().numpy()
    return found


def _iterate(wide: torch.Tensor, k: int, start: NDArray[np.float64] | None) -> Subspace | None:
    """By block Krylov iteration on the CPU; None where it has not come near enough.

    Of a large matrix on a Gram matrix of float32 products first. What is found is held to the
    matrix itself in float64, and where that does not prove it, sought again on float64 products.
    """
    import numpy as np
    import torch

    rows = wide.shape[0]
    if wide.device.type != "cpu" or rows <= max(_SMALL, block_krylov.columns(k)):
        return None
    for single in (True, False) if rows > _LARGE else (False,):
        gram = gram_of(wide, torch.float32 if single else torch.float64).numpy()
        if not np.isfinite(gram.trace()):
            continue
        found = block_krylov.eigenvectors(gram, k, start)
        if found is None:
            return None
        start = found.vectors
        vectors = torch.from_numpy(found.vectors)
        image, long = both_ways(wide, vectors)
        squares = np.einsum("ij,ij->j", found.vectors, image.numpy())
        found = block_krylov.judged(found.vectors, image.numpy(), squares)
        if found.error <= block_krylov.ENOUGH:
            values = torch.from_numpy(np.sqrt(found.squares))
            return Subspace(
                vectors[:, :k].contiguous(),
                _orthonormal(long[:, :k]),
                values[:k],
                float(values[k]),
                found.error,
                "block-krylov",
            )
    return None


def both_ways(
    matrix: torch.Tensor, short: torch.Tensor, long: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """`matrix @ long` and `matrix.T @ short` in float64, in one pass over the matrix.

    Args:
        matrix: `[m, n]`, on any device, of any floating dtype; a block of its columns is in float64
            at a time.
        short: `[m, any]`, float64.
        long: `[n, any]`, float64; by default what `matrix.T @ short` gives.
    """
    import torch

    rows, columns = matrix.shape
    step = max(1, _ENTRIES // rows)
    space = torch.empty_like(matrix[:, :step], dtype=torch.float64)
    parts, total = [], torch.zeros((), dtype=torch.float64, device=matrix.device)
    for start in range(0, columns, step):
        rest = slice(start, start + step)
        block = space[:, : columns - start]
        block.copy_(matrix[:, rest])
        parts.append(_product(block.T, short))
        total = total + _product(block, parts[-1] if long is None else long[rest])
    return total, torch.cat(parts)


def _product(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """`one @ other`; on the CPU by the library that the iteration uses, whose threads are awake."""
    import torch

    if one.device.type != "cpu":
        return one @ other
    return torch.from_numpy(one.numpy() @ other.numpy())


def _orthonormal(directions: torch.Tensor) -> torch.Tensor:
    """The same columns made orthonormal; of zeros some directions."""
    import torch

    basis, triangle = torch.linalg.qr(directions)
    signs = triangle.diagonal().sign()
    signs[signs == 0] = 1
    result: torch.Tensor = basis * signs
    return result


def _decompose(wide: torch.Tensor, k: int) -> Subspace:
    """By all eigenvectors of the Gram matrix."""
    import torch

    gram = gram_of(wide)
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
    short = vectors[:, :k].contiguous()
    long = _orthonormal(both_ways(wide, short)[1])
    return Subspace(short, long, squares[:k].sqrt(), beyond, error, "eigh")


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
