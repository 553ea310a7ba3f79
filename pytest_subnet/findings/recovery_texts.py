"""What a failed recovery says."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pytest_subnet.findings.wording import bound_below, number_against, share_against, worst
from pytest_subnet.text import facts, percent, plural

if TYPE_CHECKING:
    from collections.abc import Callable

    from pytest_subnet.findings.recovery import SubnetworkRecovery
    from pytest_subnet.findings.recovery_counts import Recovered


def nothing_to_recover(result: SubnetworkRecovery) -> str:
    """Full training moved nothing."""
    return facts(
        "nothing to recover: full holds the same bits as the base",
        [
            *result.coverage.rows(),
            (
                "usually",
                "the base was saved again, or each step was smaller than the storage",
            ),
            ("", "dtype resolves; there is no update to train inside"),
        ],
    )


def outside_moved(result: SubnetworkRecovery) -> str:
    """Sub was not trained inside the mask."""
    moved = sorted(
        (each for each in result.per_tensor if each.outside_moved),
        key=lambda each: -each.outside_moved,
    )
    entries = plural(result.numel - result.inside, "entry")
    return facts(
        f"sub moved outside the mask: {result.outside_moved:,} of {entries}",
        [
            *_counts(result),
            *_worst(moved, lambda each: (f"{each.outside_moved:,} moved outside",)),
            ("usually", "another mask or base than was trained with, weight decay or momentum on"),
            ("", "masked gradients (gradients_only=True), or training in full"),
            ("to accept", "allow_outside=True, or mask= as it was trained with"),
        ],
    )


def too_wide(result: SubnetworkRecovery) -> str:
    """The base agrees with full everywhere in the mask."""
    return facts(
        "the base agrees with full in all of the mask: nothing is left to recover",
        [
            *_counts(result),
            (
                "usually",
                "a tolerance wider than the update: any model near the base agrees",
            ),
            ("to accept", "a smaller atol; or null=None, which asserts the bare number"),
        ],
    )


def not_recovered(
    result: SubnetworkRecovery, judged: float, bound: float, *, against_base: bool
) -> str:
    """Less agrees than `match_at_least` asks for.

    Args:
        result: with entries in the mask.
        judged: the share that the bound applies to.
        bound: what is required.
        against_base: whether that is the share of what the base misses, or of all of the mask.
    """
    value, required = share_against(judged, bound)
    of_what = "of what the base misses" if against_base else "of the mask"

    def share(each: Recovered) -> float:
        return (each.recovered if against_base else each.match) or 0.0

    sorted(result.per_tensor, key=share)
    accept = bound_below(judged)
    return facts(
        f"sub recovers {value} {of_what}, required {required}",
        [
            *_counts(result),
            *_worst(
                sorted(result.per_tensor, key=share),
                lambda each: (f"{percent(share(each))} agree",),
            ),
            ("usually", "other data, order, seed or number of steps than full training had, or a"),
            ("", "tolerance of the size of single steps"),
            *([("to accept", f"match_at_least={accept}")] if accept is not None else []),
        ],
    )


def score_dropped(result: SubnetworkRecovery, allowed: float) -> str:
    """The values agree, the task score does not."""
    drop = (result.full_score or 0.0) - (result.sub_score or 0.0)
    value, limit = number_against(drop, allowed)
    return facts(
        f"the score of sub is {value} below that of full, allowed {limit}",
        [
            *_counts(result),
            ("usually", "an evaluation with more noise than that: score both with several seeds"),
            ("to accept", "a larger max_score_drop="),
        ],
    )


def _counts(result: SubnetworkRecovery) -> list[tuple[str, str]]:
    missed = f"{result.missed:,} by the base"
    if result.recovered is not None:
        missed += f", of which sub regains {result.regained:,} ({percent(result.recovered)})"
    lines = [
        *result.coverage.rows(),
        ("mask", f"{result.mask}: {result.inside:,} / {plural(result.numel, 'entry')}"),
        (
            "inside",
            f"{percent(result.match)} agree with full; of the base, untrained, "
            f"{percent(result.base_match)}",
        ),
        ("missed", missed),
        (
            "everywhere",
            f"{percent(result.whole_match)} agree; of the base {percent(result.base_whole_match)}",
        ),
    ]
    if result.full_score is not None:
        lines.append(
            (
                "score",
                f"full {result.full_score:.6g}, sub {result.sub_score:.6g}, "
                f"base {result.base_score:.6g}",
            )
        )
    return lines


def _worst(tensors: Any, numbers: Callable[[Any], tuple[str, ...]]) -> list[tuple[str, str]]:
    return worst(tensors, numbers)  # all it asks of them is name, dtype and shape
