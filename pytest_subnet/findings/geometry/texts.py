"""What a failed assertion on the geometry of an update says."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pytest_subnet.findings.common.wording import limit_above, number_against, worst
from pytest_subnet.findings.overlap.texts import CLEAR
from pytest_subnet.text import facts, percent

if TYPE_CHECKING:
    from collections.abc import Callable

    from pytest_subnet.findings.geometry.result import MaskShare, TensorGeometry, UpdateGeometry

_CHANCE = {
    "exponent": "by matrix and exponent of the base weight",
    "matrix": "by matrix",
    "rowcol": "by rows and columns of each matrix",
    "pooled": "over the whole model",
}


def nothing_updated(result_of: str) -> str:
    """No selected matrix has an updated entry."""
    return (
        f"no entry of the selected matrices of {result_of} is updated, and what share of the "
        "update lies anywhere is undefined; did the run save its base again?"
    )


def not_judged(result: UpdateGeometry, bound: str) -> str:
    """Nothing is left to chance in the mask that is bounded."""
    return facts(
        f"{bound} cannot be judged: the counts alone fix how much of the update is in its mask",
        [
            *_measured(result),
            ("why", "in each stratum of the null the update or the mask is empty or full, and"),
            ("", "nothing is left to chance"),
            ("to mend", 'another fraction=, or null="matrix"; null=None asserts the bare number'),
        ],
    )


def too_principal(result: UpdateGeometry, bound: float) -> str:
    """More of the update lies in principal entries than `max_principal_lift` allows."""
    lift = result.principal_lift or 0.0
    value, allowed = number_against(lift, bound)
    accept = limit_above(lift)
    by_luck = result.null and principal_by_luck(result) is not None
    if by_luck or (result.null and (accept is None or float(accept) >= 1)):
        accept = None
    return facts(
        f"principal lift {value} is above the allowed {allowed}{_null(result)}",
        [
            *_measured(result),
            *_worst(result, lambda each: each.principal, bound, largest=True),
            *_usually(result),
            *_to_accept(accept and f"max_principal_lift={accept}", _bare_principal(result, bound)),
        ],
    )


def too_little_low(result: UpdateGeometry, bound: float) -> str:
    """Less of the update lies in small entries than `min_low_magnitude_lift` asks for."""
    lift = result.low_magnitude_lift or 0.0
    value, required = number_against(lift, bound)
    accept = f"{lift * 0.99:.2f}"
    by_luck = result.null and low_by_luck(result) is not None
    if by_luck or (result.null and float(accept) <= 1):
        accept = ""
    return facts(
        f"low-magnitude lift {value} is below the required {required}{_null(result)}",
        [
            *_measured(result),
            *_worst(result, lambda each: each.low_magnitude, bound, largest=False),
            *_usually(result),
            *_to_accept(accept and f"min_low_magnitude_lift={accept}", _bare_low(result, bound)),
        ],
    )


def principal_by_luck(result: UpdateGeometry) -> str | None:
    """The principal lift meets its bound, and is not clearly below what chance gives."""
    z = result.principal.z
    if z is None or z <= -CLEAR:
        return None
    value, clear = number_against(z, -CLEAR)
    return _by_luck(result, "principal", f"z {value} is not below the {clear}")


def low_by_luck(result: UpdateGeometry) -> str | None:
    """The low-magnitude lift meets its bound, and is not clearly above what chance gives."""
    z = result.low_magnitude.z
    if z is None or z >= CLEAR:
        return None
    value, clear = number_against(z, CLEAR)
    return _by_luck(result, "low-magnitude", f"z {value} is below the {clear}")


def _by_luck(result: UpdateGeometry, what: str, why: str) -> str:
    lift = result.principal_lift if what == "principal" else result.low_magnitude_lift
    bare = (result.principal if what == "principal" else result.low_magnitude).bare_lift or 0.0
    return facts(
        f"{what} lift {lift or 0.0:.3g} is no evidence: {why} that is clear of "
        f"chance{_null(result)}",
        [
            *_measured(result),
            ("usually", "few updated entries, or an update that is larger in some rows or"),
            ("", "columns, which one step size does not describe"),
            *_to_accept(None, f"null=None, which asserts the bare lift, {bare:.3g}"),
        ],
    )


def _null(result: UpdateGeometry) -> str:
    if result.null is None:
        return ""
    gate = result.principal.rounding_lift is not None
    return f' (null "{result.null}"{" and rounding" if gate else ""})'


def _measured(result: UpdateGeometry) -> list[tuple[str, str]]:
    share = f"{result.fraction * 100:.4g}%"
    lines = [
        *result.coverage(),
        ("principal", _shares(result.principal)),
        ("", f"(the largest {share} of each matrix's part of rank {result.rank})"),
        ("low", _shares(result.low_magnitude)),
        ("", f"(the smallest {share} of each matrix)"),
    ]
    if result.null is not None:
        lines.append(("chance", f"is taken {_CHANCE[result.null]}"))
    lines.append(("principal", f"lift: {_lifts(result.principal)}"))
    lines.append(("low", f"lift: {_lifts(result.low_magnitude)}"))
    return lines


def _shares(share: MaskShare) -> str:
    parts = [f"{percent(share.share or 0.0)} of the update"]
    if share.by_chance is not None:
        parts.append(f"{percent(share.by_chance)} by chance")
    if share.by_rounding is not None:
        parts.append(f"{percent(share.by_rounding)} by rounding alone")
    if share.z is not None:
        parts.append(f"z {share.z:.3g}")
    return ", ".join(parts)


def _lifts(share: MaskShare) -> str:
    return ", ".join(f"{name} {lift:.3g}" for name, lift in share.lifts.items())


def _worst(
    result: UpdateGeometry,
    share_of: Callable[[TensorGeometry], MaskShare],
    bound: float,
    *,
    largest: bool,
) -> list[tuple[str, str]]:
    """The matrices with most entries on the wrong side of the bound."""

    def surplus(each: TensorGeometry) -> float:
        share = share_of(each)
        beyond = share.both - bound * _beside(result, share, largest=largest)
        return -beyond if largest else beyond

    def numbers(each: TensorGeometry) -> list[str]:
        share = share_of(each)
        beside = _beside(result, share, largest=largest)
        return [percent(share.share or 0.0), f"lift {share.both / beside:.3g}" if beside else ""]

    return worst(sorted(result.per_tensor, key=surplus), numbers)


def _beside(result: UpdateGeometry, share: MaskShare, *, largest: bool) -> float:
    """As many entries as the lift that is bounded is over: see `UpdateGeometry`."""
    if result.null is None:
        return share.updated * share.of_entries
    chance, rounding = share.expected or 0.0, share.expected_by_rounding
    if rounding is None:
        return chance
    if largest:
        return min(chance, rounding)
    return rounding if result.null == "exponent" else max(chance, rounding)


def _usually(result: UpdateGeometry) -> list[tuple[str, str]]:
    if result.principal.rounding_lift is None:
        return [("usually", "an update without the structure that is claimed")]
    return [
        ("usually", "an update that rounding alone places: in 16 bits small weights flip under"),
        ("", "any update, and few of them are principal"),
    ]


def _to_accept(bound: str | None, bare: str | None) -> list[tuple[str, str]]:
    both = ", or ".join(each for each in (bound, bare) if each)
    return [("to accept", both)] if both else []


def _bare_principal(result: UpdateGeometry, bound: float) -> str | None:
    """What asserts the bare lift, with a bound that it meets."""
    lift = result.principal.bare_lift or 0.0
    return _bare(result, None if lift <= bound else f"max_principal_lift={limit_above(lift)}")


def _bare_low(result: UpdateGeometry, bound: float) -> str | None:
    """What asserts the bare lift, with a bound that it meets."""
    lift = result.low_magnitude.bare_lift or 0.0
    accept = f"min_low_magnitude_lift={lift * 0.99:.2f}"
    return _bare(result, None if lift >= bound else accept)


def _bare(result: UpdateGeometry, bound: str | None) -> str | None:
    if result.null is None:
        return None
    with_bound = "" if bound is None else f"{bound}, "
    return f"{with_bound}null=None, which asserts the bare number"
