"""What a failed assertion on where, or how large, a mask is says."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pytest_subnet.findings.common.wording import (
    WORST,
    bound_above,
    bound_below,
    number_against,
    share_against,
    worst,
)
from pytest_subnet.text import facts, percent, plural, safe

if TYPE_CHECKING:
    from pytest_subnet.findings.concentration.density import MaskDensity, TensorDensity
    from pytest_subnet.findings.concentration.result import GroupShare, MaskConcentration


def share_below(result: MaskConcentration, group: GroupShare, bound: float) -> str:
    """Too little of the mask lies in the group."""
    share, required = share_against(group.share, bound)
    return facts(
        f"{safe(group.name)} has {share} of the mask, below the required {required}",
        [*_groups(result, group), *_accept("min_share", group, bound_below(group.share))],
    )


def share_by_size(result: MaskConcentration, group: GroupShare, bound: float) -> str:
    """The group is so large that any mask would do."""
    share, size = share_against(group.share, group.parameter_share)
    accept = bound_below(group.share)
    higher = accept is not None and float(accept) > group.parameter_share
    return facts(
        f"{safe(group.name)} has {share} of the mask, and {size} of the parameters, so that the "
        f"required {percent(bound)} says nothing",
        [
            *_groups(result, group),
            ("usually", "a pattern that names most of the model, which has most of any mask"),
            ("to accept", f"min_share={accept}" if higher else "another pattern, or min_lift="),
        ],
    )


def lift_below(result: MaskConcentration, group: GroupShare, bound: float) -> str:
    """The group has too little of the mask for its size."""
    lift, required = number_against(group.lift, bound)
    return facts(
        f"{safe(group.name)} has {lift} times its share of the mask, required {required}",
        [*_groups(result, group), *_accept("min_lift", group, bound_below(group.lift))],
    )


def no_plurality(result: MaskConcentration, group: GroupShare) -> str:
    """Another group has as much of the mask."""
    rival = next(each for each in result.groups if each.name != group.name)
    share, other = share_against(group.share, rival.share)
    if group.inside == rival.inside:
        share, other = percent(group.share), "as much"
    return facts(
        f"{safe(group.name)} has {share} of the mask, no plurality: {safe(rival.name)} has {other}",
        _groups(result, group),
    )


def density_outside(
    result: MaskDensity, below: list[TensorDensity], above: list[TensorDensity], bounds: str
) -> str:
    """Tensors that are less or more full than allowed, the furthest of each first."""
    found = [*below, *above]
    sides = [f"{len(each):,} {word}" for each, word in ((below, "below"), (above, "above")) if each]
    of_all = plural(len(result.per_tensor), "tensor")
    lowest = min(each.density for each in result.per_tensor)
    highest = max(each.density for each in result.per_tensor)
    return facts(
        f"mask density outside {bounds}: {' and '.join(sides)}, of {of_all}",
        [
            *result.facts(),
            ("densities", f"{percent(lowest)} to {percent(highest)}, one entry of slack in each"),
            *worst(
                found, lambda each: (f"{percent(each.density)}", f"{each.inside:,} in the mask")
            ),
            ("usually", "a density that differs by layer, or that is counted over all of them:"),
            ("", 'per="all" bounds the whole'),
            *(
                _to_accept(
                    bound_below(lowest) if below else None,
                    bound_above(above[0].density) if above else None,
                )
                or [("to accept", "leave out with exclude= those of which none is in the mask")]
            ),
        ],
    )


def size_outside(result: MaskDensity, bound: float, *, above: bool, what: str) -> str:
    """All of the mask is smaller or larger than allowed."""
    share, limit = share_against(result.density, bound)
    side = f"above the allowed {limit}" if above else f"below the required {limit}"
    return facts(
        f"{what} {share} is {side}",
        [
            *result.facts(),
            *_to_accept(
                None if above else bound_below(result.density),
                bound_above(result.density) if above else None,
            ),
        ],
    )


def _groups(result: MaskConcentration, group: GroupShare) -> list[tuple[str, str]]:
    lines = [
        *result.facts(),
        ("group", f"{_share(group)}   ({plural(group.tensors, 'tensor')})"),
    ]
    others = [each for each in result.groups if each.name != group.name]
    shown = [f"{safe(each.name)}: {_share(each)}" for each in others[:WORST]]
    if len(others) > WORST:
        shown.append(f"… {len(others) - WORST:,} more")
    return lines + [("beside it" if i == 0 else "", each) for i, each in enumerate(shown)]


def _share(group: GroupShare) -> str:
    return (
        f"{percent(group.share)} of the mask, {percent(group.parameter_share)} of the parameters, "
        f"lift {group.lift:.3g}"
    )


def _accept(name: str, group: GroupShare, bound: str | None) -> list[tuple[str, str]]:
    return [("to accept", f"{name}={bound}")] if group.inside and bound is not None else []


def _to_accept(lower: str | None, upper: str | None) -> list[tuple[str, str]]:
    bounds = [("at_least", lower), ("at_most", upper)]
    named = ", ".join(f"{name}={bound}" for name, bound in bounds if bound is not None)
    return [("to accept", named)] if named else []
