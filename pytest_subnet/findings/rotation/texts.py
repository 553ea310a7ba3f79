"""What a failed assertion on rotations says."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pytest_subnet.findings.common.wording import limit_above, number_against, worst
from pytest_subnet.text import facts, safe

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pytest_subnet.findings.rotation.result import SingularRotation, SingularRotations

CLEAR = 3.0
"""Deviations of the null's draws from which a rotation is told from it."""


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
            ("usually", "a learning rate too high, or singular values so close to each other that"),
            ("", "any update mixes their directions: see the gap in the table"),
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
        [
            *result.coverage(),
            *worst(ordered, _numbers),
            *_usually(result),
            *_to_accept(result, "min_angle_deg", ordered[0].beyond_null_deg),
        ],
    )


def no_excess(result: SingularRotations, min_excess: float) -> str:
    """A matrix turned no more than the null times the bound."""
    ordered = sorted(result.per_tensor, key=lambda each: each.excess or 0.0)
    excess, bound = number_against(ordered[0].excess or 0.0, min_excess)
    return facts(
        f"rotation is {excess} times that of the null, below the required {bound}: "
        f"{safe(ordered[0].name)}",
        [
            *result.coverage(),
            *worst(ordered, _numbers),
            *_usually(result),
            *_to_accept(result, "min_excess", ordered[0].excess or 0.0),
        ],
    )


def by_chance(result: SingularRotations) -> str:
    """A bound holds, but not by more than the null varies."""
    ordered = sorted(result.per_tensor, key=lambda each: each.z or 0.0)
    z, clear = number_against(ordered[0].z or 0.0, CLEAR)
    return facts(
        f"rotation is no evidence: z {z} is below the {clear} that is clear of chance: "
        f"{safe(ordered[0].name)}",
        [
            *result.coverage(),
            *worst(ordered, _numbers),
            *_usually(result),
            *_bare(result),
        ],
    )


def _usually(result: SingularRotations) -> list[tuple[str, str]]:
    if result.null is None:
        return [("usually", "an update that is small, or of values that are far apart")]
    return [
        ("usually", "an update without a direction of its own: any that is small turns vectors"),
        ("", "and leaves values"),
    ]


def _to_accept(result: SingularRotations, name: str, least: float) -> list[tuple[str, str]]:
    """A lower bound that holds, if there is one that says something."""
    if result.null is None:
        return [("to accept", f"{name}={_limit_below(least)}")]
    clear = all(each.z is not None and each.z >= CLEAR for each in result.per_tensor)
    if not clear or least <= (1 if name == "min_excess" else 0):
        return _bare(result)
    return [("to accept", f"{name}={_limit_below(least)}")]


def _bare(result: SingularRotations) -> list[tuple[str, str]]:
    least = min(each.mean_deg for each in result.per_tensor)
    return [("to accept", f"min_angle_deg={_limit_below(least)}, null=None: the bare angle")]


def _limit_below(value: float) -> str:
    """A number as a lower bound that it meets."""
    return repr(-float(limit_above(-value) or -value)) if value else "0.0"


def _numbers(each: SingularRotation) -> list[str]:
    null = "" if each.null_deg is None else f"null {each.null_deg:.3g}°"
    excess = "" if each.excess is None else f"excess {each.excess:.3g}"
    z = "" if each.z is None else f"z {each.z:.1f}"
    return [f"{each.mean_deg:.3g}°", null, excess, z]
