"""How far two masks overlap by chance: the nulls and their statistics, from counts alone.

A null holds the number of entries of both masks fixed in each *stratum* and draws which entries
they are. Strata are whole matrices, or finer.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

_LEAST_FOR_BOOTSTRAP = 30
_LEAST_FOR_INTERVAL = 3
_RESAMPLES = 1000
_DRAWN_AT_ONCE = 1 << 20


class Chance(NamedTuple):
    """What a null expects of the intersection.

    Attributes:
        expected: entries in both masks, in all.
        variance: of that number; None where the null has no closed form.
        ceiling: the largest intersection that the counts allow: the smaller one, over the strata.
        strata: how many there are.
        degenerate: strata in which a mask is empty or full, so that nothing is left to chance.
        by_tensor: float64 `[tensors]`, what is expected in each.
        variance_by_tensor: float64 `[tensors]`; None where the null has no closed form for it.
    """

    expected: float
    variance: float | None
    ceiling: int
    strata: int
    degenerate: int
    by_tensor: NDArray[np.float64]
    variance_by_tensor: NDArray[np.float64] | None


def hypergeometric(
    numel: NDArray[np.int64], a: NDArray[np.int64], b: NDArray[np.int64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean and variance of the intersection of random sets of `a` and `b` out of `numel` entries.

    Args:
        numel: int64 `[strata]`, at least 1.
        a: int64 `[strata]`, at most `numel`.
        b: likewise.

    >>> mean, variance = hypergeometric(np.array([5000]), np.array([400]), np.array([700]))
    >>> mean.item(), round(variance.item(), 3)
    (56.0, 44.316)
    """
    # In floating point: a·b leaves int64 at 3e9 entries, a·b·(N-a)·(N-b) at 2e5.
    expected = a.astype(np.float64) * b / numel
    # A full mask gives the other's count to the last digit, so that it adds nothing to O - E.
    expected = np.where(a == numel, b, np.where(b == numel, a, expected))
    variance = expected * ((numel - a) / numel) * ((numel - b) / np.maximum(numel - 1, 1))
    return expected, variance


def by_strata(
    numel: NDArray[np.int64],
    a: NDArray[np.int64],
    b: NDArray[np.int64],
    *,
    owner: NDArray[np.intp],
    tensors: int,
) -> Chance:
    """Random sets of fixed size in every stratum; those without entries count for nothing.

    Args:
        numel: int64 `[strata]`, entries.
        a: int64 `[strata]`, those in one mask.
        b: int64 `[strata]`, those in the other.
        owner: intp `[strata]`, to which tensor a stratum belongs.
        tensors: how many tensors there are.
    """
    some = numel > 0
    numel, a, b, owner = numel[some], a[some], b[some], owner[some]
    expected, variance = hypergeometric(numel, a, b)
    by_tensor = _summed(owner, expected, tensors)
    variance_by_tensor = _summed(owner, variance, tensors)
    return Chance(
        expected=math.fsum(by_tensor),
        variance=math.fsum(variance_by_tensor),
        ceiling=int(np.minimum(a, b).sum()),
        strata=numel.size,
        degenerate=int(((a == 0) | (a == numel) | (b == 0) | (b == numel)).sum()),
        by_tensor=by_tensor,
        variance_by_tensor=variance_by_tensor,
    )


def pooled(numel: NDArray[np.int64], a: NDArray[np.int64], b: NDArray[np.int64]) -> Chance:
    """Random sets of fixed size in the whole model, whatever matrix they fall into.

    The baseline of arXiv 2505.11711, appendix E. Masks that agree on nothing but how dense each
    matrix is are far above it.
    """
    n, count_a, count_b = int(numel.sum()), int(a.sum()), int(b.sum())
    ways = count_a * count_b  # Python's whole numbers: exact up to the one division
    return Chance(
        expected=ways / n,
        variance=ways * (n - count_a) * (n - count_b) / (n * n * max(n - 1, 1)),
        ceiling=min(count_a, count_b),
        strata=1,
        degenerate=int(count_a in (0, n) or count_b in (0, n)),
        by_tensor=numel.astype(np.float64) * (ways / n / n),
        variance_by_tensor=None,
    )


def _summed(
    owner: NDArray[np.intp], values: NDArray[np.float64], tensors: int
) -> NDArray[np.float64]:
    return np.asarray(np.bincount(owner, values, tensors), np.float64)


def by_rows_and_columns(
    numel: NDArray[np.int64],
    a: NDArray[np.int64],
    b: NDArray[np.int64],
    *,
    products: Sequence[tuple[int, int] | None],
) -> Chance:
    """Random sets that keep about how full each row and each column is (Chung and Lu).

    Has no closed variance.

    Args:
        numel: int64 `[tensors]`, entries.
        a: int64 `[tensors]`, those in one mask.
        b: int64 `[tensors]`, those in the other.
        products: for each tensor, the sum over its rows of (entries in a) · (entries in b), and the
            same over its columns; None for a tensor without rows, where only its size is kept.
    """
    matrices = by_strata(numel, a, b, owner=np.arange(numel.size), tensors=numel.size)
    by_tensor = matrices.by_tensor.copy()
    for index, each in enumerate(products):
        ways = int(a[index]) * int(b[index])
        if each is not None and ways:
            by_tensor[index] = each[0] * each[1] / ways
    return matrices._replace(
        expected=math.fsum(by_tensor), variance=None, by_tensor=by_tensor, variance_by_tensor=None
    )


def odds_ratio(
    numel: NDArray[np.int64],
    a: NDArray[np.int64],
    b: NDArray[np.int64],
    both: NDArray[np.int64],
) -> float | None:
    """Mantel and Haenszel's odds ratio over strata: 1 by chance, whatever the densities.

    Inf where no entry is in one mask alone with another in the other alone; None where there is
    nothing to compare.
    """
    n = np.maximum(numel, 1)
    agree = math.fsum(both * ((numel - a - b + both) / n))
    differ = math.fsum((a - both) * ((b - both) / n))
    if differ == 0:
        return math.inf if agree > 0 else None
    return agree / differ


class Interval(NamedTuple):
    """Where a lift lies with 95 % confidence, if matrices are exchangeable.

    Attributes:
        low: lower end.
        high: upper end.
        method: `"bootstrap"` over matrices, or `"leave one out"` below 30 of them.
        matrices: how many there are.
    """

    low: float
    high: float
    method: str
    matrices: int


def lift_interval(both: NDArray[np.int64], expected: NDArray[np.float64]) -> Interval | None:
    """The interval of the lift over matrices: sum of `both` over sum of `expected`.

    Resamples matrices with replacement, seeded, and takes percentiles. Below 30 matrices these
    are too narrow (they cover .82 with 6), and a t-interval on leave-one-out values is taken;
    below 3 there is none.

    Args:
        both: int64 `[tensors]`, intersections.
        expected: float64 `[tensors]`; tensors in which nothing is expected tell nothing.
    """
    telling = expected > 0
    found, chance = both[telling].astype(np.float64), expected[telling]
    matrices = chance.size
    if matrices < _LEAST_FOR_INTERVAL:
        return None
    if matrices < _LEAST_FOR_BOOTSTRAP:
        return Interval(*_leave_one_out(found, chance), "leave one out", matrices)
    return Interval(*_bootstrap(found, chance), "bootstrap", matrices)


def _bootstrap(found: NDArray[np.float64], chance: NDArray[np.float64]) -> tuple[float, float]:
    random = np.random.default_rng(0)
    matrices = found.size
    lifts: list[NDArray[np.float64]] = []
    for start in range(0, _RESAMPLES, step := max(1, _DRAWN_AT_ONCE // matrices)):
        drawn = random.integers(0, matrices, (min(step, _RESAMPLES - start), matrices))
        lifts.append(found[drawn].sum(axis=1) / chance[drawn].sum(axis=1))
    low, high = np.quantile(np.concatenate(lifts), [0.025, 0.975]).tolist()
    return low, high


def _leave_one_out(found: NDArray[np.float64], chance: NDArray[np.float64]) -> tuple[float, float]:
    from scipy.special import stdtrit  # deferred: only who looks at an interval pays for it

    matrices = found.size
    lift = found.sum() / chance.sum()
    without = (found.sum() - found) / (chance.sum() - chance)
    error = math.sqrt((matrices - 1) * float(np.var(without)))
    half = float(stdtrit(matrices - 1, 0.975)) * error
    return max(0.0, float(lift) - half), float(lift) + half
