"""Counting singular values without computing them, from a Gram matrix in float64.

The eigenvalues of G = D Dᵀ (or Dᵀ D, whichever is smaller) are the squares of D's singular values,
so how many singular values exceed τ is how many eigenvalues G - τ² I has above zero:

* All of them, when its Cholesky factorisation exists.
* Otherwise the number of positive pivots of its LDLᵀ factorisation (Sylvester's law of inertia).

Squaring costs half the digits, and float64 has them: the tolerance of a rank is σ1 max(m, n) 2^-23,
so τ² is at least λ1 max(m, n)² 1.4e-14, and the factorisations are off by about λ1 max(m, n) 1e-16.
For 4096 x 14336 that moves the tolerance by a millionth of itself; a float32 SVD, which is off by
some σ1 1e-7, by a ten-thousandth. Small matrices have less room and take a float64 SVD.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    import torch
    from numpy.typing import NDArray

SMALL = 256
"""Rows and columns up to which all singular values are computed at once."""

COLUMNS = 2048
"""How much of the long side is in float64 at a time."""

_ENTRIES = 1 << 20
"""How many entries are looked at at once."""

_FURTHEST = 1000
"""log2 of the largest factor by which updates are scaled; those of 1e-300 are 10 after it."""

LARGEST = 1e-7
"""Relative error allowed of the largest eigenvalue."""

SLACK = 4e-16
"""By how much a factorisation may be off: so much of the largest entry, for each row."""


class Spectrum:
    """The singular values of a matrix, as far as they have been asked for."""

    def __init__(self, matrix: torch.Tensor, *, all_values: bool = False) -> None:
        """Form the Gram matrix; rows and columns of zeros are dropped, they add no value.

        Args:
            matrix: `[m, n]`, finite, on any device.
            all_values: compute all of them now: slower, but any number of counts is free then.
        """
        import torch

        matrix = without_zeros(matrix)
        self.size = min(matrix.shape)
        self._largest: float | None = None
        self._all_above = -1.0
        self._gram: torch.Tensor | None = None
        self._values: torch.Tensor | None = None
        if self.size == 0:
            self._values = torch.zeros(0, dtype=torch.float64)
        elif max(matrix.shape) <= SMALL:
            self._values = torch.linalg.svdvals(matrix.double().cpu())
        else:
            self._gram = gram_of(matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T)
            if all_values:
                self._values = singular_values(self._gram)

    @classmethod
    def of(
        cls,
        *,
        gram: torch.Tensor | None = None,
        largest: float | None = None,
        values: torch.Tensor | None = None,
    ) -> Spectrum:
        """What was found out of a matrix elsewhere: its Gram matrix or all its singular values.

        Args:
            gram: float64 `[size, size]`, both triangles.
            largest: the largest eigenvalue of `gram`, if it is known.
            values: float64 `[size]` on the CPU.
        """
        self = cls.__new__(cls)
        self.size = len(gram if values is None else values)  # type: ignore[arg-type]
        self._largest = None if largest is None else math.sqrt(largest)
        self._all_above = -1.0
        self._gram, self._values = gram, values
        return self

    def undecided(self, limit: float) -> torch.Tensor | None:
        """The Gram matrix, if it takes that to count what is above `limit`."""
        if self._values is not None or limit <= self._all_above or limit >= self.largest():
            return None
        return self._gram

    def learn(self, *, all_above: float = -1.0, values: torch.Tensor | None = None) -> None:
        """Take over that all values are above a limit, or which ones they are."""
        self._all_above = max(self._all_above, all_above)
        if values is not None:
            self._values = values

    def largest(self) -> float:
        """σ1, to seven digits; 0 for a matrix of zeros."""
        if self._largest is None:
            found = None
            if self._values is None and self._gram is not None:
                found = _largest_eigenvalue(self._gram)
            if found is not None:
                self._largest = math.sqrt(found)
            else:
                self._largest = float(self.values().max()) if self.size else 0.0
        return self._largest

    def count_above(self, limit: float) -> int:
        """How many singular values are greater than `limit`, which is not negative."""
        if self._values is not None or self._gram is None:
            return int((self.values() > limit).sum())
        if limit <= self._all_above:
            return self.size
        if limit >= self.largest():
            return 0
        shift = limit * limit
        if _is_positive(self._gram, shift):
            return self.size
        return _positive_eigenvalues(self._gram, shift)

    def values(self) -> torch.Tensor:
        """All of them, float64 `[min(m, n)]` on the CPU, in any order."""
        if self._values is None:
            assert self._gram is not None
            self._values = singular_values(self._gram)
        return self._values


def scaled(matrix: torch.Tensor) -> tuple[torch.Tensor, int]:
    """`matrix` times a power of two, so that its squares are within float64, and log2 of that.

    Overwrites it. Exact for what matters beside the largest entry. Squares of float32 always are:
    any matrix but float64, and one that is not finite, comes back as it is.
    """
    import torch

    largest = float(matrix.abs().max()) if matrix.dtype == torch.float64 and matrix.numel() else 0.0
    if not largest or not math.isfinite(largest) or 1e-100 < largest < 1e100:
        return matrix, 0
    shift = max(-_FURTHEST, min(_FURTHEST, -math.frexp(largest)[1]))
    return matrix.mul_(2.0**shift), shift


def frobenius_norm(matrix: torch.Tensor) -> float:
    """The root of the sum of squares, added up in float64; no finite number with NaN or Inf."""
    import torch

    norm = torch.linalg.vector_norm
    return math.hypot(*(float(norm(each, dtype=torch.float64)) for each in _blocks(matrix)))


def is_finite(matrix: torch.Tensor) -> bool:
    """Whether there is neither NaN nor Inf in it."""
    import torch

    # Fifty times as fast as to ask each entry; a NaN anywhere is both extremes.
    return not matrix.numel() or all(bool(each.isfinite()) for each in torch.aminmax(matrix))


def _blocks(matrix: torch.Tensor) -> Sequence[torch.Tensor]:
    """Some rows at a time: on a CPU torch makes a copy of all that it casts or compares."""
    if matrix.device.type != "cpu":
        return (matrix,)
    step = max(1, _ENTRIES // max(1, matrix.shape[1]))
    return [matrix[start : start + step] for start in range(0, len(matrix), step)] or [matrix]


def without_zeros(matrix: torch.Tensor) -> torch.Tensor:
    """`matrix` without its rows and columns of zeros; itself where there are none."""
    import torch

    moved = [(each.any(dim=1), each.any(dim=0)) for each in _blocks(matrix)]
    rows = torch.cat([each for each, _ in moved])
    columns = torch.stack([each for _, each in moved]).any(dim=0)
    if not rows.all():
        matrix = matrix[rows]
    return matrix if columns.all() else matrix[:, columns]


def effective_rank(values: torch.Tensor) -> float:
    """How many equal values have the entropy of σ / Σσ (Roy and Vetterli, 2007); 0 without any."""
    shares = values[values > 0] / values.sum()
    return float((-(shares * shares.log()).sum()).exp()) if len(shares) else 0.0


def gram_of(matrix: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """The lower triangle of `matrix @ matrix.T`.

    On a GPU the upper one is filled too, on the CPU it is zero.

    Args:
        matrix: `[m, n]`, on any device.
        dtype: of the product: float64 (default), or float32 in half the time.
    """
    import torch

    rows, columns = matrix.shape
    dtype = dtype or torch.float64
    if matrix.device.type != "cpu":
        total = torch.zeros(rows, rows, dtype=dtype, device=matrix.device)
        for start in range(0, columns, COLUMNS):
            block = matrix[:, start : start + COLUMNS].to(dtype)
            total.addmm_(block, block.T)
        return total
    from scipy.linalg.blas import dsyrk, ssyrk  # half the work of a product

    multiply = dsyrk if dtype == torch.float64 else ssyrk
    result = torch.zeros(rows, rows, dtype=dtype).numpy().T  # Fortran's order
    space = torch.empty_like(matrix[:, :COLUMNS], dtype=dtype)
    for start in range(0, columns, COLUMNS):
        part = space[:, : columns - start].copy_(matrix[:, start : start + COLUMNS]).numpy()
        across = int(part.flags.c_contiguous)
        part = part.T if across else part
        result = multiply(1.0, part, beta=1.0, c=result, trans=across, lower=1, overwrite_c=1)
    return torch.from_numpy(result)


def _shifted(gram: torch.Tensor, sign: float, shift: float) -> torch.Tensor:
    """`sign * gram + shift I`, in memory of its own, laid out as `gram` is."""
    result = gram * sign
    result.diagonal().add_(shift)
    return result


def _largest_eigenvalue(gram: torch.Tensor) -> float | None:
    """By Lanczos; None where it has not converged, or has converged to another one.

    Lanczos only ever finds a lower bound. That nothing is above it is certified: λ (1 + ε) I - G
    has a Cholesky factorisation.
    """
    found = _lanczos(gram)
    if found is None or not math.isfinite(found) or found <= 0:
        return None
    bound = found * (1 + 2 * LARGEST)
    return found if _factorises(_shifted(gram, -1.0, bound)) else None


def _lanczos(gram: torch.Tensor) -> float | None:
    import numpy as np
    from scipy.sparse.linalg import ArpackError, LinearOperator, eigsh

    size = gram.shape[0]
    if size < 3:
        return None
    if gram.device.type == "cpu":
        from scipy.linalg.blas import dsymv

        array = gram.numpy()

        def times(vector: NDArray[np.float64]) -> NDArray[np.float64]:
            product: NDArray[np.float64] = dsymv(1.0, array, vector.ravel(), lower=1)
            return product
    else:
        import torch

        def times(vector: NDArray[np.float64]) -> NDArray[np.float64]:
            on_device = torch.from_numpy(vector.ravel().copy()).to(gram.device)
            product: NDArray[np.float64] = (gram @ on_device).cpu().numpy()
            return product

    # Scaled, so that ARPACK's own thresholds mean what they say for updates of 1e-7.
    scale = float(gram.diagonal().sum())
    operator = LinearOperator((size, size), matvec=lambda v: times(v) / scale, dtype=np.float64)
    start = np.random.default_rng(0).standard_normal(size)
    try:
        (value,) = eigsh(
            operator, k=1, which="LA", tol=LARGEST, v0=start, return_eigenvectors=False
        )
    except ArpackError:
        return None
    return float(value) * scale


def _is_positive(gram: torch.Tensor, shift: float) -> bool:
    """Whether every eigenvalue of `gram` is certainly above `shift`.

    The factorisation of a matrix that is short of positive by its rounding may come out, so that
    it is asked a little more; what fails for that is counted.
    """
    slack = SLACK * gram.shape[0] * float(gram.diagonal().max())
    return _factorises(_shifted(gram, 1.0, -shift - slack))


def _factorises(matrix: torch.Tensor) -> bool:
    """Whether the Cholesky factorisation of the lower triangle exists; overwrites it."""
    import torch

    if matrix.device.type != "cpu":
        return int(torch.linalg.cholesky_ex(matrix).info) == 0
    from scipy.linalg.lapack import dpotrf

    _, info = dpotrf(matrix.numpy(), lower=1, clean=0, overwrite_a=1)
    return int(info) == 0


def _positive_eigenvalues(gram: torch.Tensor, shift: float) -> int:
    """How many eigenvalues of `gram` are above `shift`."""
    if gram.device.type != "cpu":
        return int((_eigenvalues(gram) > shift).sum())
    import numpy as np
    from scipy.linalg.lapack import dsytrf

    size = gram.shape[0]
    # The default workspace is that of unblocked code, ten times as slow.
    factors, pivots, _ = dsytrf(
        _shifted(gram, 1.0, -shift).numpy(), lower=1, lwork=64 * size, overwrite_a=1
    )
    diagonal = np.diagonal(factors)
    single = pivots > 0  # both rows of a 2 x 2 block are marked by a negative number
    return int((diagonal[single] > 0).sum() + (~single).sum() // 2)  # a block has one of each sign


def singular_values(gram: torch.Tensor) -> torch.Tensor:
    """All singular values, of one matrix or of a batch of them.

    Those below 1e-8 σ1 are lost in the rounding of their squares.
    """
    return _eigenvalues(gram).clamp(min=0).sqrt().cpu()


def _eigenvalues(gram: torch.Tensor) -> torch.Tensor:
    import torch

    values: torch.Tensor = torch.linalg.eigvalsh(gram, UPLO="L")
    return values
