"""What a failed sparsity gate says."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pytest_subnet.findings.common.wording import bound_above, bound_below, share_against, worst
from pytest_subnet.text import facts, percent, plural

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pytest_subnet.findings.common.result import Movement
    from pytest_subnet.findings.sparsity.finding import UpdateSparsity


def identical(result: UpdateSparsity, what: str = "nothing moved") -> str:
    """Nothing moved, whatever the bounds."""
    return facts(
        f"{what}: base and tuned hold the same values",
        [
            *_counts(result),
            (
                "usually",
                "the base was saved again, an adapter was not merged, no optimiser step was",
            ),
            ("", "made, or each was smaller than half a step of the storage dtype"),
            ("to accept", "allow_identical=True"),
        ],
    )


def too_dense(result: UpdateSparsity, bound: float) -> str:
    """More moved than `at_least` allows."""
    value, required = share_against(result.sparsity, bound)
    return facts(
        f"update sparsity {value} is below the required {required}",
        [
            *_counts(result),
            *_rounding(result),
            *_worst(sorted(result.per_tensor, key=lambda each: each.sparsity)),
            ("usually", "a higher learning rate, another optimiser, or more steps than before"),
            *_to_accept("at_least", bound_below(result.sparsity)),
        ],
    )


def too_sparse(result: UpdateSparsity, bound: float) -> str:
    """Less moved than `at_most` allows."""
    value, allowed = share_against(result.sparsity, bound)
    return facts(
        f"update sparsity {value} is above the allowed {allowed}",
        [
            *_counts(result),
            *_rounding(result),
            *_worst(sorted(result.per_tensor, key=lambda each: -each.sparsity)),
            ("usually", "too small a learning rate for the storage dtype, too few steps, or parts"),
            ("", "that the optimiser does not own"),
            *_to_accept("at_most", bound_above(result.sparsity)),
        ],
    )


def uneven(result: UpdateSparsity, furthest: Sequence[Movement], bound: float) -> str:
    """A matrix is further from the pooled sparsity than `max_spread` allows.

    Args:
        result: with at least two matrices.
        furthest: the matrices, the one furthest off first.
        bound: what is allowed.
    """
    spread = result.spread or 0.0
    value, allowed = (share.replace("%", " points") for share in share_against(spread, bound))
    updated, numel = sum(each.updated for each in furthest), sum(each.numel for each in furthest)
    pooled = (numel - updated) / numel
    return facts(
        f"a matrix is {value} off, allowed {allowed}",
        [
            *_counts(result),
            *_rounding(result),
            (
                "pooled",
                f"{percent(pooled)} unchanged over {plural(len(furthest), 'matrix')}",
            ),
            *worst(
                furthest,
                lambda each: (
                    percent(each.sparsity),
                    f"{100 * (each.sparsity - pooled):+.2f} points",
                ),
            ),
            ("usually", "a part that is frozen, or trained at another learning rate"),
            *_to_accept("max_spread", bound_above(spread), "leave the part out with exclude="),
        ],
    )


def _counts(result: UpdateSparsity) -> list[tuple[str, str]]:
    others = [
        f"{name}: {percent((result.numel - updated) / result.numel)} unchanged"
        for name, updated in result.updated_under.items()
        if name != str(result.tolerance)
    ]
    lines = [
        *result.coverage.rows(),
        ("updated", f"{result.updated:,} / {result.numel:,}   (density {percent(result.density)})"),
        ("also", "; ".join(others)),
    ]
    if result.zero_sign_flips:
        lines.append(("zeros", f"{plural(result.zero_sign_flips, 'zero')} only changed sign"))
    if result.nonfinite:
        base = sum(each.nonfinite_base for each in result.per_tensor)
        lines.append(("not finite", f"{result.nonfinite - base:,} in tuned, {base:,} in base"))
    if result.apart:
        moved = sum(each.updated > 0 for each in result.apart)
        apart = plural(len(result.apart), "tensor")
        lines.append(("apart", f"{apart} (buffers, integers), {moved:,} moved"))
    return lines


def _rounding(result: UpdateSparsity) -> list[tuple[str, str]]:
    """How much of the number an update without any structure would show."""
    if result.expected_sparsity is None or result.nothing_moved:
        return []
    share = percent(result.expected_sparsity)
    return [("rounding", f"alone would leave about {share} unchanged (estimate)")]


def _worst(tensors: Sequence[Movement]) -> list[tuple[str, str]]:
    return worst(tensors, lambda each: (f"{percent(each.sparsity)} unchanged",))


def _to_accept(name: str, bound: str | None, otherwise: str = "") -> list[tuple[str, str]]:
    """What to paste; nothing where only a bound that says nothing would hold."""
    choices = [otherwise] if otherwise else []
    if bound is not None:
        choices.append(f"{name}={bound}")
    return [("to accept", ", or ".join(choices))] if choices else []
