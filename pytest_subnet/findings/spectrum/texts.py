"""What a failed assertion on singular values says."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pytest_subnet.findings.common.wording import limit_above, number_against, worst
from pytest_subnet.text import facts, safe

if TYPE_CHECKING:
    from pytest_subnet.findings.spectrum.result import SingularShift, SingularShifts


def nothing_moved(result: SingularShifts) -> str:
    """No matrix changed."""
    return facts(
        "no matrix moved: of course its singular values are stable",
        [
            *result.coverage(),
            ("usually", "the base was saved again, or no step was as large as the dtype resolves"),
            ("instead", "assert_frozen, if nothing was meant to move"),
        ],
    )


def too_far(result: SingularShifts, max_shift: float) -> str:
    """The singular values of a matrix moved too far."""
    ordered = sorted(result.per_tensor, key=lambda each: -each.shift)
    shift, bound = number_against(result.shift, max_shift)
    return facts(
        f"singular shift {shift} is above the allowed {bound}: {safe(ordered[0].name)}",
        [
            *result.coverage(),
            *worst(ordered, _numbers),
            *_usually(result),
            ("to accept", f"max_shift={limit_above(result.shift)}"),
        ],
    )


def _usually(result: SingularShifts) -> list[tuple[str, str]]:
    if result.relative_to == "each":
        return [
            ("usually", "the smallest values, which noise moves by more than themselves;"),
            ("", 'relative_to="spectrum" asks how far all of them moved'),
        ]
    return [("usually", "a learning rate too high, or weights that were scaled or replaced")]


def _numbers(each: SingularShift) -> list[str]:
    sign = "<= " if each.is_bound else ""
    most = "" if each.moved_most is None else f"most at σ{each.moved_most + 1}"
    return [f"{sign}{each.shift:.3g}", most]
