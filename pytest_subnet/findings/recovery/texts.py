"""What a failed recovery says."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from pytest_subnet.findings.common.wording import (
    WORST,
    bound_below,
    number_against,
    share_against,
    worst,
)
from pytest_subnet.text import facts, percent, plural, safe

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pytest_subnet.errors import Problem
    from pytest_subnet.findings.recovery.counts import Recovered
    from pytest_subnet.findings.recovery.finding import SubnetworkRecovery


def not_of_one_model(roles: str, pair: str, problems: Sequence[Problem]) -> str:
    """Two of the three do not align.

    Args:
        roles: which two, as the arguments are called.
        pair: how they are labelled, escaped.
        problems: at least one.
    """
    counts = Counter(each.kind for each in problems)
    rows = [("pair", pair)]
    for each in problems[:WORST]:
        # What else is in there is advice to those who open the pair themselves.
        what = each.text if each.kind == "ambiguous" else each.text.partition("; ")[0]
        rows.append((each.kind, f"{safe(each.name)}  {what}".rstrip()))
    if len(problems) > WORST:
        rows.append(("", f"… {len(problems) - WORST:,} more"))
    mend = ["leave tensors out with exclude="]
    if any("as_dtype=" in each.text for each in problems):
        mend.insert(0, 'compare all three in one dtype with as_dtype="bfloat16"')
    rows.append(("to mend", "; ".join(mend)))
    summary = ", ".join(f"{count:,} {kind}" for kind, count in counts.items())
    return facts(f"tensors of {roles} do not pair: {summary}", rows)


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


def diverged(result: SubnetworkRecovery) -> str:
    """Full has values in the mask that nothing can agree with."""
    found = sorted(
        (each for each in result.per_tensor if each.nonfinite_inside),
        key=lambda each: -each.nonfinite_inside,
    )
    return facts(
        f"full has NaN or Inf in {result.nonfinite_inside:,} of {plural(result.inside, 'entry')} "
        "of the mask: no values to recover",
        [
            *_counts(result),
            *worst(found, lambda each: (f"{each.nonfinite_inside:,} in the mask",)),
            ("usually", "full training that diverged: assert_finite(open_pair(base, full))"),
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
            *worst(moved, lambda each: (f"{each.outside_moved:,} moved outside",)),
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

    def share(each: Recovered) -> float | None:
        return each.recovered if against_base else each.match

    # A tensor in which there is nothing to recover has no share, and did nothing wrong.
    shares = [(found, each) for each in result.per_tensor if (found := share(each)) is not None]
    lowest_first = [each for _, each in sorted(shares, key=lambda pair: pair[0])]
    accept = bound_below(judged)
    return facts(
        f"sub recovers {value} {of_what}, required {required}",
        [
            *_counts(result),
            *worst(lowest_first, lambda each: (f"{percent(share(each) or 0.0)} agree",)),
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
    if result.nonfinite:
        lines.append(
            (
                "not finite",
                f"{result.nonfinite_full:,} of full, of these {result.nonfinite_inside:,} in the "
                f"mask; {result.nonfinite_sub:,} of sub",
            )
        )
    if result.full_score is not None:
        lines.append(
            (
                "score",
                f"full {result.full_score:.6g}, sub {result.sub_score:.6g}, "
                f"base {result.base_score:.6g}",
            )
        )
    return lines
