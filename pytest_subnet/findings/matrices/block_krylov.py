"""Leading eigenvectors of a Gram matrix, by block Krylov iteration."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

WIDTH = 8
"""Vectors that go through the matrix at once; few, so that its powers come to be high."""

_FIRST_LOOK = 2.5
_LOOKS = 1.25
"""Vectors for each one wanted when the directions are first worked out, and by what they grow."""

_AGAIN = 4
"""Blocks gathered from fresh directions before what was found is believed."""

ENOUGH = math.radians(0.002)
"""The iteration has found a subspace when it is off by no more than this."""

_CLEAR = 1e-6
"""A direction of which the projections leave less is rounding; another takes its place."""

_EPS = 2.0**-52


class Leading(NamedTuple):
    """What was found.

    Attributes:
        squares: `[k + 1]`, eigenvalues, largest first.
        vectors: `[m, k + 1]`, orthonormal columns.
        error: by how much, in radians, the first k may be off together.
    """

    squares: NDArray[np.float64]
    vectors: NDArray[np.float64]
    error: float


def columns(k: int) -> int:
    """How many vectors the iteration holds at most."""
    return 10 * (k + 2 * WIDTH)


def eigenvectors(
    gram: NDArray[np.floating], k: int, start: NDArray[np.float64] | None = None
) -> Leading | None:
    """The k leading eigenvectors and the next; None where it has not come near enough.

    Subspace iteration that keeps what it passes through (Musco and Musco 2015, algorithm 2), with
    blocks narrower than k. When it has come near enough it goes on from directions of its own: of a
    value that many directions share, the first ones may have shown it too few.

    Args:
        gram: `[m, m]`, of which the lower triangle is there, and nothing above it.
        k: with `columns(k)` at most m.
        start: `[m, any]`, directions among which the leading ones are thought to be.
    """
    import numpy as np

    full = np.add(gram, gram.T, dtype=np.float64)
    full[np.diag_indices_from(full)] /= 2
    random = np.random.default_rng(0)
    block = random.standard_normal((len(full), WIDTH))
    if start is not None:
        # Not in these alone: a direction that they have no part of would not be found.
        block = 0.1 * block + start @ random.standard_normal((start.shape[1], WIDTH))
    basis, images = (np.empty((len(full), columns(k)), order="F") for _ in range(2))
    inner = np.zeros((columns(k),) * 2)
    look, believed = _FIRST_LOOK * (k + WIDTH), False
    for end in range(WIDTH, columns(k) + 1, WIDTH):
        new = slice(end - WIDTH, end)
        basis[:, new] = _beside(basis[:, : end - WIDTH], block)
        block = (basis[:, new].T @ full).T  # the matrix is symmetric, and this way a third faster
        images[:, new] = block
        inner[:end, new] = basis[:, :end].T @ block
        if end < look:
            continue
        found = _ritz(basis[:, :end], images[:, :end], inner[:end, :end], k)
        if found.error > ENOUGH:
            look, believed = end * _LOOKS, False
        elif believed:
            return found
        else:
            look, believed = end + _AGAIN * WIDTH, True
            block = random.standard_normal(block.shape)
    return None


def _beside(basis: NDArray[np.float64], block: NDArray[np.float64]) -> NDArray[np.float64]:
    """Orthonormal columns of `block`, orthogonal to `basis`; other directions where it has none."""
    import numpy as np

    left = 0.0
    while left < _CLEAR:
        before = np.linalg.norm(block, axis=0).max()
        for _ in range(2):  # the first leaves what rounding makes of a small remainder
            block = block - basis @ (basis.T @ block)
        block, triangle = np.linalg.qr(block)
        left = float(np.abs(triangle.diagonal()).min() / before) if before else 0.0
    return block


def _ritz(
    basis: NDArray[np.float64], images: NDArray[np.float64], inner: NDArray[np.float64], k: int
) -> Leading:
    """The best k + 1 directions of those that `basis` spans, and how good they are."""
    import numpy as np

    squares, turn = np.linalg.eigh(inner, UPLO="U")
    best = turn[:, : -k - 2 : -1]
    return judged(basis @ best, images @ best, squares[: -k - 2 : -1])


def judged(
    vectors: NDArray[np.float64], image: NDArray[np.float64], squares: NDArray[np.float64]
) -> Leading:
    """What the images of k + 1 directions under a Gram matrix say of the first k.

    By Davis and Kahan an invariant subspace is within residual / gap of theirs.
    """
    import numpy as np

    missed = image - vectors * squares
    noise = len(vectors) ** 0.5 * _EPS * float(squares[0])
    residual = max(float(np.linalg.norm(missed[:, :-1])), noise)
    # The next one is found from below: it may be as far above as it misses.
    gap = float(squares[-2] - squares[-1] - np.linalg.norm(missed[:, -1]))
    return Leading(squares.clip(min=0), vectors, angle(residual, gap))


def angle(residual: float, gap: float) -> float:
    """The angle whose sine is residual / gap; a right one where there is no gap."""
    return math.asin(min(1.0, residual / gap)) if gap > 0 else math.pi / 2
