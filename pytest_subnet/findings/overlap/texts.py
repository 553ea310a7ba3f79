"""What a failed overlap says."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pytest_subnet.findings.common.wording import (
    WORST,
    bound_above,
    bound_below,
    number_against,
    share_against,
)
from pytest_subnet.text import column, facts, percent, plural, safe, spell_tensor

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from pytest_subnet.findings.overlap.result import MaskOverlap, TensorOverlap

CLEAR = 2.0
"""Standard deviations above chance from which on a share counts as more than chance."""

_STRATA = {
    "exponent": "by matrix and exponent of the base weight",
    "matrix": "by matrix",
    "rowcol": "by rows and columns of each matrix",
    "pooled": "over the whole model",
}


def exponents_missing(masks: str, obstacle: str) -> str:
    """The exponent null was asked for, or is the default, and cannot be had."""
    return (
        f'null="exponent" cannot be had for {masks}: {obstacle}; name null="matrix" for '
        "the weaker comparison with chance in each matrix, which rounding alone can exceed"
    )


def identical(result: MaskOverlap) -> str:
    """A lower bound on two masks with the same bits."""
    return facts(
        "the masks are bit for bit the same: their overlap is no evidence",
        [
            *_counts(result),
            ("usually", "a run compared with itself, with a copy, or with its own mask file"),
            ("to mend", "compare another run; null=None asserts the bare min_jaccard and"),
            ("", "min_one_sided"),
        ],
    )


def near_chance(result: MaskOverlap) -> bool:
    """Whether the overlap is so little above what the null expects that luck explains it."""
    return result.z is not None and result.z < CLEAR


def saturated(result: MaskOverlap, bound: str) -> str:
    """A lower bound where nothing is left to chance."""
    why = f"chance is taken {_STRATA[str(result.null)]}, and "
    if result.saturated:
        reason = [("why", f"{why}in each such part a mask")]
        reason += [("", "is empty or full: the counts alone fix the overlap, and it says nothing")]
    else:  # "rowcol" alone: full rows fix the overlap of a matrix that is neither empty nor full
        reason = [("why", f"{why}how full they are")]
        reason += [("", "alone makes it expect the largest overlap that the counts allow")]
    return facts(
        f"{bound} cannot be judged: the masks are saturated",
        [
            *_counts(result),
            *reason,
            ("to mend", "compare sparser masks, or other tensors; null=None asserts the bare"),
            ("", "min_jaccard and min_one_sided"),
        ],
    )


def lift_below(result: MaskOverlap, bound: float) -> str:
    """The overlap is a smaller multiple of chance than `min_lift`."""
    lift = result.lift or 0.0
    value, required = number_against(lift, bound)
    return facts(
        f"overlap lift {value} is below the required {required}{_null(result)}",
        [
            *_counts(result),
            *_furthest(result, lambda each: each.intersection - bound * (each.expected or 0.0)),
            *_usually(result),
            *_to_accept("min_lift", bound_below(lift) if lift else None),
        ],
    )


def kappa_below(result: MaskOverlap, bound: float) -> str:
    """The overlap goes a smaller part of the way from chance to the most than `min_kappa`."""
    kappa = result.kappa or 0.0
    value, required = number_against(kappa, bound)
    return facts(
        f"overlap kappa {value} is below the required {required}{_null(result)}",
        [
            *_counts(result),
            *_furthest(result, lambda each: each.intersection - (each.expected or 0.0)),
            *_usually(result),
            *_to_accept("min_kappa", bound_below(kappa) if kappa > 0 else None),
        ],
    )


def jaccard_below(result: MaskOverlap, bound: float) -> str:
    """The masks share less than `min_jaccard`, or not more than chance would."""
    return _share_below(
        result,
        ("Jaccard", "min_jaccard", bound),
        result.jaccard,
        result.jaccard_by_chance,
        lambda each: each.intersection - bound * (each.count_a + each.count_b - each.intersection),
    )


def one_sided_below(result: MaskOverlap, bound: float) -> str:
    """The larger mask has less of itself in the other than `min_one_sided`, or only by chance."""
    a_is_larger = result.count_a >= result.count_b
    return _share_below(
        result,
        (f"one-sided share of {'a' if a_is_larger else 'b'}", "min_one_sided", bound),
        result.one_sided,
        result.one_sided_by_chance,
        lambda each: each.intersection - bound * (each.count_a if a_is_larger else each.count_b),
    )


def jaccard_above(result: MaskOverlap, bound: float) -> str:
    """The masks share more than `max_jaccard`."""
    value, allowed = share_against(result.jaccard, bound)
    return facts(
        f"overlap Jaccard {value} is above the allowed {allowed}",
        [
            *_counts(result),
            *_furthest(
                result,
                lambda each: (
                    bound * (each.count_a + each.count_b - each.intersection) - each.intersection
                ),
            ),
            ("usually", "denser masks than before, or two runs that moved the same part"),
            *_to_accept("max_jaccard", bound_above(result.jaccard)),
        ],
    )


def _share_below(
    result: MaskOverlap,
    what: tuple[str, str, float],
    share: float,
    by_chance: float | None,
    surplus: Callable[[TensorOverlap], float],
) -> str:
    name, keyword, bound = what
    if share < bound:
        value, required = share_against(share, bound)
        return facts(
            f"overlap {name} {value} is below the required {required}{_null(result)}",
            [
                *_counts(result),
                *_furthest(result, surplus),
                *_usually(result),
                *_to_accept(keyword, bound_below(share)),
            ],
        )
    return _explained(result, what, share, by_chance or 0.0)


def _explained(
    result: MaskOverlap, what: tuple[str, str, float], share: float, by_chance: float
) -> str:
    name, keyword, bound = what
    higher = bound_below(share)
    accept = "null=None, which asserts the bare number"
    if higher is not None and float(higher) > by_chance and not near_chance(result):
        accept = f"{keyword}={higher}, or {accept}"
    value, chance = share_against(share, by_chance)
    if by_chance < bound:
        z, clear = number_against(result.z or 0.0, CLEAR)
        verdict = f"and z {z} is below the {clear} that is clear of luck"
    else:
        verdict = f"so that the required {percent(bound)} says nothing"
    return facts(
        f"overlap {name} {value}: chance alone gives {chance}, {verdict}{_null(result)}",
        [*_counts(result), *_usually(result), ("to accept", accept)],
    )


def _null(result: MaskOverlap) -> str:
    return f' (null "{result.null}")' if result.null else ""


def _counts(result: MaskOverlap) -> list[tuple[str, str]]:
    tensors = f"{len(result.per_tensor):,}/{plural(result.tensors_total, 'tensor')}"
    lines = [
        ("a", f"{result.a}   ({_size(result.count_a, result.numel)})"),
        ("b", f"{result.b}   ({_size(result.count_b, result.numel)})"),
        ("covers", f"{result.dtype}, {tensors}, {plural(result.numel, 'entry')}"),
        (
            "overlap",
            f"{result.intersection:,} in both: {percent(result.one_sided_a)} of a, "
            f"{percent(result.one_sided_b)} of b, Jaccard {percent(result.jaccard)}",
        ),
    ]
    if result.nonfinite:
        found = [("a", result.nonfinite_a), ("b", result.nonfinite_b)]
        sides = ", ".join(f"{count:,} in {side}" for side, count in found if count)
        lines.append(("not finite", f"{sides}: NaN and Inf, updated wherever their bits changed"))
    if result.null is not None:
        lines.append(("chance", f"{_chance(result)}"))
    lifts = ", ".join(f"{name} {lift:.4g}" for name, lift in result.lifts.items())
    lines.append(("lifts", lifts or "none: chance expects no overlap"))
    if interval := result.interval:
        lines.append(
            (
                "interval",
                f"lift {interval.low:.4g} to {interval.high:.4g} with 95 % confidence "
                f"({interval.method}, {plural(interval.matrices, 'matrix')})",
            )
        )
    if result.degenerate:
        lines.append(
            (
                "strata",
                f"{result.degenerate:,} of {result.strata:,} have a mask empty or full: left to "
                "no chance, and out of z",
            )
        )
    return lines


def _size(count: int, numel: int) -> str:
    return f"{plural(count, 'entry')}, density {percent(count / numel)}"


def _chance(result: MaskOverlap) -> str:
    numbers = [f"z {result.z:.4g}" if result.z is not None else "z unknown"]
    numbers += [f"kappa {result.kappa:.4g}"] if result.kappa is not None else []
    if result.odds_ratio is not None:  # other strata than the rest of the line has: it says so
        other = " by matrix" if result.null in ("exponent", "rowcol") else ""
        numbers.append(f"odds ratio{other} {result.odds_ratio:.4g}")
    return (
        f"{result.expected or 0.0:,.1f} expected {_STRATA[str(result.null)]}   "
        f"({', '.join(numbers)})"
    )


def _furthest(
    result: MaskOverlap, surplus: Callable[[TensorOverlap], float]
) -> list[tuple[str, str]]:
    """The tensors that count most against the bound."""
    rows = sorted((each for each in result.per_tensor if surplus(each) < 0), key=surplus)
    lines = _aligned(rows[:WORST])
    if len(rows) > WORST:
        lines.append(f"… {len(rows) - WORST:,} more")
    return column("worst", lines)


def _aligned(rows: Sequence[TensorOverlap]) -> list[str]:
    cells = [
        (
            safe(each.name),
            f"Jaccard {percent(each.jaccard or 0.0)}",
            "" if each.lift is None else f"lift {each.lift:.3g}",
            f"({spell_tensor(each.dtype, each.shape)})",
        )
        for each in rows
    ]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) for cell, width in zip(row, widths, strict=True) if width
        ).rstrip()
        for row in cells
    ]


def _usually(result: MaskOverlap) -> list[tuple[str, str]]:
    if result.null == "exponent":
        return [
            ("usually", "two runs that share their base and little else: rounding lets the same"),
            ("", "small weights flip in both, which other nulls take for overlap"),
        ]
    return [
        ("usually", "runs that moved other parts, or masks of other densities than before"),
    ]


def _to_accept(name: str, bound: str | None) -> list[tuple[str, str]]:
    return [("to accept", f"{name}={bound}")] if bound is not None else []
