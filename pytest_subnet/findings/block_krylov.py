"""Leading eigenvectors of a Gram matrix, by block Krylov iteration."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

EXTRA = 16
"""Vectors that are iterated beyond those asked for."""

_BLOCKS = 20
_LOOK = 4
"""After so many blocks the directions are worked out of what was gathered."""

_ROUNDS = 3
_PACE = 0.1
"""A round that leaves more than this of the error is the last."""

_ENOUGH = math.radians(0.002)
"""The iteration has found a subspace when it is off by no more than this."""

_EPS = 2.0**-52


class Leading(NamedTuple):
    """What was found.

    Attributes:
        squares: `[k + EXTRA]`, eigenvalues, largest first.
        vectors: `[m, k + EXTRA]`, orthonormal columns.
        error: by how much, in radians, the first k may be off together.
    """

    squares: NDArray[np.float64]
    vectors: NDArray[np.float64]
    error: float


def columns(k: int) -> int:
    """How many vectors the iteration holds at most."""
    return _BLOCKS * (k + EXTRA)


def eigenvectors(
    gram: NDArray[np.float64], k: int, start: NDArray[np.float64] | None = None
) -> Leading | None:
    """The k leading eigenvectors; None where it has not come near enough.

    Subspace iteration that keeps what it passes through (Musco and Musco 2015, algorithm 2), begun
    anew from the directions found when it holds `columns(k)` vectors.

    Args:
        gram: `[m, m]`, float64, of which the lower triangle is there.
        k: with `columns(k)` at most m.
        start: `[m, k]`, where to start from; None starts from random directions.
    """
    import numpy as np

    fresh = np.random.default_rng(0).standard_normal((len(gram), k + EXTRA))
    block = fresh if start is None else np.hstack([start, fresh[:, k:]])
    before = math.inf
    for _ in range(_ROUNDS):
        found = _round(gram, k, block)
        if found.error <= _ENOUGH:
            return found
        if found.error > _PACE * before:
            return None
        before, block = found.error, found.vectors
    return None


def _round(gram: NDArray[np.float64], k: int, block: NDArray[np.float64]) -> Leading:
    """Gather blocks until the k leading directions are in what they span."""
    import numpy as np
    from scipy.linalg.blas import dsymm

    width = block.shape[1]
    basis = np.empty((len(gram), _BLOCKS * width), order="F")
    inner = np.zeros((_BLOCKS * width,) * 2)
    for end in range(width, _BLOCKS * width + 1, width):
        new = basis[:, end - width : end]
        new[:] = _beside(basis[:, : end - width], block)
        image = dsymm(1.0, gram, new, lower=1)
        # The image of a block has parts in the two last blocks only, and in the next.
        near = slice(max(0, end - 2 * width), end)
        inner[near, end - width : end] = basis[:, near].T @ image
        if end % (_LOOK * width) == 0:
            found = _ritz(gram, basis[:, :end], inner[:end, :end], k)
            if found.error <= _ENOUGH:
                break
        block = image - basis[:, near] @ inner[near, end - width : end]
    return found


def _beside(basis: NDArray[np.float64], block: NDArray[np.float64]) -> NDArray[np.float64]:
    """Orthonormal columns of `block`, orthogonal to `basis`; other directions where it has none."""
    import numpy as np

    block = np.linalg.qr(block).Q
    left = 0.0
    while left < 0.5:  # what a projection leaves of a direction, rounding has a part in
        block, triangle = np.linalg.qr(block - basis @ (basis.T @ block))
        left = float(np.abs(triangle.diagonal()).min())
    return block


def _ritz(
    gram: NDArray[np.float64], basis: NDArray[np.float64], inner: NDArray[np.float64], k: int
) -> Leading:
    """The best k + EXTRA directions of those that `basis` spans, and how good they are."""
    import numpy as np
    from scipy.linalg import eigh
    from scipy.linalg.blas import dsymm

    size = len(inner)
    squares, turn = eigh(inner, lower=False, subset_by_index=[size - k - EXTRA, size - 1])
    squares = squares[::-1].clip(min=0)
    vectors = basis @ turn[:, ::-1]
    moved = dsymm(1.0, gram, np.asfortranarray(vectors[:, : k + 1]), lower=1)
    missed = moved - vectors[:, : k + 1] * squares[: k + 1]
    noise = len(gram) ** 0.5 * _EPS * float(squares[0])
    # The next one is found from below: it may be as far above as it misses.
    beyond = float(squares[k] + np.linalg.norm(missed[:, k]))
    error = angle(max(float(np.linalg.norm(missed[:, :k])), noise), float(squares[k - 1]) - beyond)
    return Leading(squares, vectors, error)


def angle(residual: float, gap: float) -> float:
    """Davis and Kahan: an invariant subspace is within residual / gap of what was found."""
    return math.asin(min(1.0, residual / gap)) if gap > 0 else math.pi / 2
