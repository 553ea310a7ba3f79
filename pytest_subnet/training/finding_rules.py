"""When a search for a subnetwork has settled, whether it was stable, and which λ is taken."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pytest_subnet.errors import SubnetError

if TYPE_CHECKING:
    from collections.abc import Sequence

_LOOKED_BACK = 10
_HIGHER = 0.25
_TIMES = 1.25
_BEFORE_THE_END = 100


def is_settled(kept: int, undecided: int) -> bool:
    """Whether the undecided entries are less than 1 % of those kept; or none at all.

    >>> is_settled(1000, 9), is_settled(1000, 10), is_settled(0, 0)
    (True, False, True)
    """
    return undecided == 0 or undecided < 0.01 * kept


def is_stable(losses: Sequence[float]) -> bool:
    """Whether every spike of the loss was recovered from 100 steps before the end, or earlier.

    A spike is a loss more than 0.25, or more than a quarter, above the mean of the (up to) ten
    before it; it is recovered from where the loss is back at that mean.

    >>> is_stable([2.0] * 50 + [2.3] + [2.0] * 101), is_stable([2.0] * 50 + [2.3] + [2.0] * 100)
    (True, False)
    """
    end = len(losses) - _BEFORE_THE_END
    # The lowest loss from a step on, up to where it must have recovered.
    lowest = [float("inf")] * (len(losses) + 1)
    for step in range(end - 1, -1, -1):
        lowest[step] = min(losses[step], lowest[step + 1])
    for step in range(1, len(losses)):
        before = losses[max(0, step - _LOOKED_BACK) : step]
        mean = sum(before) / len(before)
        is_spike = losses[step] > mean + _HIGHER or losses[step] > mean * _TIMES
        if is_spike and lowest[step] > mean:
            return False
    return True


def sparsest(
    lambdas: Sequence[float], scores: Sequence[float], counts: Sequence[int], within: float
) -> int:
    """Which of several λ has the fewest entries and a score not more than `within` below λ = 0's.

    Returns:
        Its place; of equal counts the one with the better score.

    >>> sparsest([0, 1, 5], [0.98, 0.95, 0.93], [100, 40, 10], within=0.04)
    1
    """
    least = scores[list(lambdas).index(0)] - within
    enough = [place for place, score in enumerate(scores) if score >= least]
    if not enough:
        raise SubnetError("no λ has a score to choose by")
    return min(enough, key=lambda place: (counts[place], -scores[place]))
