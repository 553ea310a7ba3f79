"""Counts of right answers: what a curve of them may be, and what may be said of two of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from statistics import NormalDist
from typing import NamedTuple, TypeAlias

from pytest_subnet.text import percent, plural, safe

Count: TypeAlias = tuple[int, int]
"""`(successes, trials)`."""

Outcomes: TypeAlias = Sequence[bool] | Mapping[str, bool]
"""What came of each item: in one order, or by its name."""

Curve: TypeAlias = Sequence[tuple[int, int, int]] | Sequence[tuple[int, Outcomes]]
"""`(step, successes, trials)` or `(step, outcomes)` of each checkpoint."""

_FEWEST = 3
_SOME = 4
"""How many trials are enough is looked for up to this power of ten times those there are."""


class Point(NamedTuple):
    """One checkpoint.

    Attributes:
        step: where in the run.
        successes: items that came out right.
        trials: items.
        outcomes: what came of each item, in the order of the first checkpoint; None if unpaired.
    """

    step: int
    successes: int
    trials: int
    outcomes: tuple[bool, ...] | None = None

    @property
    def rate(self) -> float:
        """Share of items that came out right."""
        return self.successes / self.trials

    @property
    def counted(self) -> Count:
        """As `(successes, trials)`."""
        return self.successes, self.trials


def check_alpha(alpha: float) -> None:
    """Raise unless `alpha` is an error that one may allow."""
    if isinstance(alpha, bool) or not isinstance(alpha, int | float):
        raise TypeError(f"alpha={alpha!r} is not a number")
    if not 0 < alpha < 0.5:
        raise ValueError(f"alpha={alpha!r} is not in (0, 0.5); 0.05 allows one error in twenty")


def check_count(name: str, count: object) -> None:
    """Raise unless `count` is `(successes, trials)` with at least one trial."""
    if not isinstance(count, Sequence) or isinstance(count, str) or len(count) != 2:
        raise TypeError(f"{name}={safe(repr(count))} is not (successes, trials)")
    successes, trials = count
    for what, value in (("successes", successes), ("trials", trials)):
        if not _is_integer(value):
            hint = "; a rate does not say of how many" if isinstance(value, float) else ""
            raise TypeError(f"{name}: {what}={safe(repr(value))} is not an integer{hint}")
    if trials < 1:
        raise ValueError(f"{name}: trials={trials} shows nothing")
    if not 0 <= successes <= trials:
        raise ValueError(f"{name}: successes={successes} of trials={trials}")


def read_curve(curve: object) -> list[Point]:
    """The checkpoints of a curve by their steps; `ValueError` or `TypeError` for what is none."""
    if not isinstance(curve, Sequence) or isinstance(curve, str):
        raise TypeError(
            f"a curve is a list of (step, successes, trials) or (step, outcomes), not "
            f"{type(curve).__name__}"
        )
    if len(curve) < _FEWEST:
        raise ValueError(
            f"{plural(len(curve), 'checkpoint')} of at least {_FEWEST}: a peak is one among others"
        )
    points = [_read_row(row, curve[0]) for row in curve]
    points.sort(key=lambda point: point.step)
    for one, other in pairwise(points):
        if one.step == other.step:
            raise ValueError(f"step {one.step} is there twice")
        if (one.outcomes is None) != (other.outcomes is None):
            raise ValueError("some checkpoints have counts and some outcomes; give one form")
        if one.outcomes is not None and one.trials != other.trials:
            raise ValueError(
                f"step {one.step} has {one.trials:,} items and step {other.step} {other.trials:,}; "
                "paired outcomes are of the same items"
            )
    return points


def _read_row(row: object, first: object) -> Point:
    if not isinstance(row, Sequence) or isinstance(row, str) or len(row) not in (2, 3):
        raise TypeError(
            f"{safe(repr(row))} is neither (step, successes, trials) nor (step, outcomes)"
        )
    step = row[0]
    if not _is_integer(step):
        raise TypeError(f"step {safe(repr(step))} is not an integer")
    if len(row) == 3:
        check_count(f"step {step}", tuple(row[1:]))
        return Point(int(step), int(row[1]), int(row[2]))
    items = _items(row[1], first, int(step))
    if not items:
        raise ValueError(f"step {step}: no items show nothing")
    for value in items:
        if not isinstance(value, bool) and type(value).__name__ not in ("bool", "bool_"):
            raise TypeError(f"step {step}: outcome {safe(repr(value))} is not a boolean")
    outcomes = tuple(bool(value) for value in items)
    return Point(int(step), sum(outcomes), len(outcomes), outcomes)


def _items(outcomes: object, first: object, step: int) -> list[object]:
    """The outcomes in the order of the first checkpoint."""
    if isinstance(outcomes, Mapping):
        order = first[1] if isinstance(first, Sequence) and len(first) == 2 else outcomes
        if not isinstance(order, Mapping) or order.keys() != outcomes.keys():
            raise ValueError(
                f"step {step} was tried on other items than the first checkpoint; paired outcomes "
                "are of the same items"
            )
        return [outcomes[item] for item in order]
    if isinstance(outcomes, str) or not hasattr(outcomes, "__iter__"):
        raise TypeError(f"step {step}: {safe(repr(outcomes))} are no outcomes")
    return list(outcomes)


def _is_integer(value: object) -> bool:
    # numpy's integers have an index as Python's have; its booleans too, in older versions.
    return hasattr(value, "__index__") and "bool" not in type(value).__name__


def fisher(one: Count, other: Count) -> float:
    """The two-sided p-value of Fisher's exact test that both have one rate."""
    from scipy.stats import fisher_exact

    rows = [[successes, trials - successes] for successes, trials in (one, other)]
    return float(fisher_exact(rows).pvalue)


def same_or_worse(earlier: Point, last: Point) -> float:
    """The two-sided p-value of the exact test that both have one rate.

    McNemar's where the items are the same: of those that changed, half did so each way.
    """
    if earlier.outcomes is None or last.outcomes is None:
        return fisher(earlier.counted, last.counted)
    from scipy.stats import binomtest

    lost, won = _changed(earlier.outcomes, last.outcomes)
    return float(binomtest(lost, lost + won, 0.5).pvalue) if lost + won else 1.0


def _changed(earlier: tuple[bool, ...], last: tuple[bool, ...]) -> tuple[int, int]:
    """Items that were right and are wrong, and those that were wrong and are right."""
    lost = sum(before and not after for before, after in zip(earlier, last, strict=True))
    won = sum(after and not before for before, after in zip(earlier, last, strict=True))
    return lost, won


def bounds_of_drop(earlier: Point, last: Point, alpha: float) -> tuple[float, float]:
    """One-sided confidence bounds of the drop, each allowing the error `alpha`.

    Newcombe's hybrid of the score intervals of both rates; where the items are the same, with the
    correlation of their outcomes.
    """
    drop = earlier.rate - last.rate
    low_1, high_1 = _wilson(earlier.counted, alpha)
    low_2, high_2 = _wilson(last.counted, alpha)
    phi = 0.0
    if earlier.outcomes is not None and last.outcomes is not None:
        phi = _correlation(earlier.outcomes, last.outcomes)
    below = earlier.rate - low_1, high_2 - last.rate
    above = high_1 - earlier.rate, last.rate - low_2
    lower = drop - math.sqrt(max(below[0] ** 2 - 2 * phi * below[0] * below[1] + below[1] ** 2, 0))
    upper = drop + math.sqrt(max(above[0] ** 2 - 2 * phi * above[0] * above[1] + above[1] ** 2, 0))
    return max(lower, -1.0), min(upper, 1.0)


def _wilson(count: Count, alpha: float) -> tuple[float, float]:
    """Wilson's score interval of a rate, each end allowing the error `alpha`."""
    successes, trials = count
    z = NormalDist().inv_cdf(1 - alpha)
    middle = successes + z * z / 2
    width = z * math.sqrt(successes * (trials - successes) / trials + z * z / 4)
    return (middle - width) / (trials + z * z), (middle + width) / (trials + z * z)


def _correlation(earlier: tuple[bool, ...], last: tuple[bool, ...]) -> float:
    """Phi of the fourfold table, with Newcombe's correction for continuity when positive."""
    trials = len(earlier)
    lost, won = _changed(earlier, last)
    both = sum(before and after for before, after in zip(earlier, last, strict=True))
    neither = trials - both - lost - won
    margins = (both + lost) * (won + neither) * (both + won) * (lost + neither)
    if not margins:
        return 0.0
    product = float(both * neither - lost * won)
    if product > 0:
        product = max(product - trials / 2, 0.0)
    return product / math.sqrt(margins)


def fieller(
    peak: Count, forgotten: Count, restored: Count, alpha: float
) -> tuple[float | None, float | None]:
    """Fieller's two-sided interval of (restored - forgotten) / (peak - forgotten).

    None at an end that the data leave open: both, where peak and forgotten may be one rate.
    """
    rates = [successes / trials for successes, trials in (peak, forgotten, restored)]
    # Agresti and Caffo's one more success and failure: a rate of 0 or 1 is not known for certain.
    shares = [(successes + 1) / (trials + 2) for successes, trials in (peak, forgotten, restored)]
    totals = [trials + 2 for _, trials in (peak, forgotten, restored)]
    top, low, back = (s * (1 - s) / n for s, n in zip(shares, totals, strict=True))
    above, below = rates[2] - rates[1], rates[0] - rates[1]
    z = NormalDist().inv_cdf(1 - alpha / 2) ** 2
    square = below**2 - z * (top + low)
    cross = above * below - z * low
    constant = above**2 - z * (back + low)
    if square <= 0:
        return None, None
    root = math.sqrt(max(cross**2 - square * constant, 0))
    return (cross - root) / square, (cross + root) / square


def enough_trials(peak: Count, last: Count, max_drop: float, alpha: float) -> int | None:
    """About how many trials a checkpoint would show that drop, at the rates seen; None for none."""
    one, other = (successes / trials for successes, trials in (peak, last))
    if one - other >= max_drop:
        return None
    for tenths in range(10, 10 * _SOME + 1):
        trials = math.ceil(max(peak[1], last[1]) * 10 ** (tenths / 10 - 1))
        before, after = (Point(0, round(rate * trials), trials) for rate in (one, other))
        if bounds_of_drop(before, after, alpha)[1] < max_drop:
            return trials
    return None


def spelt(count: Count) -> str:
    """A count with its rate.

    >>> spelt((41, 234))
    '17.52% (41 of 234)'
    """
    return f"{percent(count[0] / count[1])} ({count[0]:,} of {count[1]:,})"
