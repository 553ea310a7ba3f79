"""How far the leading directions of a base turn by an update that means nothing."""

from __future__ import annotations

import math
from itertools import chain
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeAlias

from pytest_subnet.arithmetic import plain_arithmetic
from pytest_subnet.findings.matrices.spectra import frobenius_norm
from pytest_subnet.findings.matrices.subspaces import leading, principal_angles_deg

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    import torch

    from pytest_subnet.findings.matrices.subspaces import Subspace

Null: TypeAlias = Literal["gaussian", "support"] | None
NULLS = ("gaussian", "support", None)

DRAWS = 8
"""The mean over a subspace varies by some 5 % from draw to draw."""

_ROWS = 1024

_SMALL = 1024
"""Up to this many rows or columns the directions of a draw are computed exactly."""

_EXTRA = 16
_ROUNDS = 10
_SWEEPS = 3
_SETTLED = 5e-3
"""Relative change of the mean angle from one round of sweeps to the next."""


class Turned(NamedTuple):
    """The mean angles that random updates of the same norm give.

    Attributes:
        mean: over the draws, in degrees.
        deviation: their standard deviation.
    """

    mean: float
    deviation: float


def turned_by_chance(
    read_base: Callable[[], Iterable[torch.Tensor]],
    known: Subspace,
    norm: float,
    sides: tuple[str, ...],
    *,
    support: torch.Tensor | None = None,
    draws: int = DRAWS,
) -> Turned:
    """Add random updates to a base and see how far its leading directions turn, on average.

    Args:
        read_base: gives the base, `[m, n]`, some rows at a time, in order; called for each draw:
            the base is not held beside what is made of it.
        known: its leading subspaces.
        norm: Frobenius norm of the updates.
        sides: `"left"`, `"right"` or both.
        support: `[m, n]` booleans: where the updates are not zero; None for everywhere.
        draws: how many.
    """
    shape = known.left.shape[0], known.right.shape[0]
    means = [
        _mean_angle(_moved(read_base(), shape, norm, support, seed), known, sides)
        for seed in range(draws)
    ]
    mean = math.fsum(means) / draws
    spread = math.fsum((each - mean) ** 2 for each in means) / max(draws - 1, 1)
    return Turned(mean, math.sqrt(spread))


def _moved(
    base: Iterable[torch.Tensor],
    shape: tuple[int, int],
    norm: float,
    support: torch.Tensor | None,
    seed: int,
) -> torch.Tensor:
    """The base and a random update of this norm."""
    import torch

    rest = iter(base)
    first = next(rest)
    wide = torch.float64 if first.dtype == torch.float64 else torch.float32
    generator = torch.Generator().manual_seed(seed)
    noise = torch.empty(shape, dtype=wide).normal_(generator=generator).to(first.device)
    if support is not None:
        for start in range(0, shape[0], _ROWS):  # at once, all of it would be cast
            noise[start : start + _ROWS] *= support[start : start + _ROWS]
    size = frobenius_norm(noise)
    noise.mul_(norm / size if size else 0.0)
    start = 0
    for block in chain([first], rest):
        noise[start : start + len(block)] += block
        start += len(block)
    return noise


@plain_arithmetic()
def _mean_angle(matrix: torch.Tensor, known: Subspace, sides: tuple[str, ...]) -> float:
    """The mean angle between the leading directions of `matrix` and the known ones.

    Of large matrices by subspace iteration until the mean settles. It is little moved by the last
    directions at the boundary, which converge last.
    """
    import torch

    k = known.right.shape[1]
    if min(matrix.shape) <= _SMALL:
        found = leading(matrix, k)
        return _mean(found.left, found.right, known, sides)
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(matrix.shape[1], _EXTRA, generator=generator, dtype=matrix.dtype)
    block = torch.cat([known.right.to(matrix.dtype), start.to(matrix.device)], dim=1)
    before = -1.0
    for _ in range(_ROUNDS):
        for _ in range(_SWEEPS):
            left = torch.linalg.qr(matrix @ torch.linalg.qr(block).Q).Q
            block = matrix.T @ left
        _, _, turn = torch.linalg.svd(block, full_matrices=False)
        one, other = (torch.linalg.qr((each @ turn[:k].T).double()).Q for each in (left, block))
        found_now = _mean(one, other, known, sides)
        if abs(found_now - before) <= _SETTLED * found_now:
            return found_now
        before = found_now
    return before


def _mean(
    left: torch.Tensor, right: torch.Tensor, known: Subspace, sides: tuple[str, ...]
) -> float:
    import torch

    pairs = {"left": (known.left, left), "right": (known.right, right)}
    return float(torch.cat([principal_angles_deg(*pairs[side]) for side in sides]).mean())
