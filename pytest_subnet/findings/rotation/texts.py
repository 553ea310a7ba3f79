"""What a failed assertion on rotations says."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pytest_subnet.findings.common.wording import limit_above, number_against, worst
from pytest_subnet.text import facts, safe

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pytest_subnet.findings.rotation.result import SingularRotation, SingularRotations


def identical(result: SingularRotations, still: Sequence[SingularRotation]) -> str:
    """A matrix did not change at all."""
    which = "no matrix moved" if result.nothing_moved else f"{safe(still[0].name)} did not move"
    return facts(
        f"{which}: nothing turned",
        [
            *result.coverage(),
            *worst(still, lambda each: ["identical"]),
            ("usually", "the base was saved again, or weights that were frozen"),
        ],
    )


def too_far(result: SingularRotations, max_angle_deg: float) -> str:
    """A matrix turned further than allowed."""
    ordered = sorted(result.per_tensor, key=lambda each: -each.mean_deg)
    angle, bound = number_against(ordered[0].mean_deg, max_angle_deg)
    return facts(
        f"rotation {angle}° is above the allowed {bound}°: {safe(ordered[0].name)}",
        [
            *result.coverage(),
            *worst(ordered, _numbers),
            ("to accept", f"max_angle_deg={limit_above(ordered[0].mean_deg)}"),
        ],
    )


def too_little(result: SingularRotations, min_angle_deg: float) -> str:
    """A matrix turned less than required, once the null is taken off."""
    ordered = sorted(result.per_tensor, key=lambda each: each.beyond_null_deg)
    beyond = "" if result.null is None else " beyond the null"
    angle, bound = number_against(ordered[0].beyond_null_deg, min_angle_deg)
    return facts(
        f"rotation {angle}°{beyond} is below the required {bound}°: {safe(ordered[0].name)}",
        [*result.coverage(), *worst(ordered, _numbers), *_advice(result)],
    )


def no_excess(result: SingularRotations, min_excess: float) -> str:
    """A matrix turned no more than the null times the bound."""
    ordered = sorted(result.per_tensor, key=lambda each: each.excess or 0.0)
    excess, bound = number_against(ordered[0].excess or 0.0, min_excess)
    return facts(
        f"rotation is {excess} times that of the null, below the required {bound}: "
        f"{safe(ordered[0].name)}",
        [*result.coverage(), *worst(ordered, _numbers), *_advice(result)],
    )


def by_chance(result: SingularRotations, least_z: float) -> str:
    """A bound holds, but not by more than the null varies."""
    ordered = sorted(result.per_tensor, key=lambda each: each.z or 0.0)
    return facts(
        f"rotation is {ordered[0].z:.1f} deviations above the null, which {least_z:g} would tell "
        f"from chance: {safe(ordered[0].name)}",
        [*result.coverage(), *worst(ordered, _numbers), *_advice(result)],
    )


def _advice(result: SingularRotations) -> list[tuple[str, str]]:
    if result.null is None:
        return []
    return [
        ("usually", "an update without a direction of its own: any that is small turns vectors"),
        ("", "and leaves values; null=None asserts the bare angle"),
    ]


def _numbers(each: SingularRotation) -> list[str]:
    null = "" if each.null_deg is None else f"null {each.null_deg:.3g}°"
    z = "" if each.z is None else f"z {each.z:.1f}"
    return [f"{each.mean_deg:.3g}°", null, z]
