"""What a failed assertion on a subnetwork says."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pytest_subnet.findings.common.wording import number_against
from pytest_subnet.text import facts, plural

if TYPE_CHECKING:
    from pytest_subnet.findings.subnetworks.result import (
        SubnetworkNecessity,
        SubnetworkScores,
        SubnetworkSufficiency,
    )

_MEANS = {
    "base": ("the updates in", "the other updates undone"),
    "zero": ("the entries in", "the others zero"),
    "mean": ("the entries in", "the others at the mean of their tensor"),
}


def by_construction(result: SubnetworkSufficiency) -> str:
    """Filling outside the mask leaves the model as it is."""
    return facts(
        "the subnetwork is the whole tuned model: filling outside the mask changes no bit",
        [
            *_facts(result),
            ("usually", "the mask of the whole update, held against its own base: outside it both"),
            ("", "models agree, so that its score is that of the tuned model by construction"),
            ("to mend", 'a mask of a part of the update, or fill="zero"; controls=0 asserts the'),
            ("", "bare score"),
        ],
    )


def insufficient(result: SubnetworkSufficiency, min_score: float) -> str:
    """The subnetwork alone scores too low."""
    value, required = number_against(result.subnetwork, min_score)
    of_what, others = _MEANS[result.fill]
    return facts(
        f"the subnetwork scores {value}, below the required {required}",
        [
            *_facts(result),
            ("claim", f"{of_what} the mask are enough, with {others}"),
            ("usually", "a mask that is too small, or made from another run, model or task"),
            *_upside_down(result),
            ("to accept", f"min_score={_at_most(result.subnetwork)}"),
        ],
    )


def unnecessary(result: SubnetworkNecessity, min_drop: float) -> str:
    """The score hardly falls without the subnetwork."""
    value, required = number_against(result.drop, min_drop)
    of_what, _ = _MEANS[result.fill]
    usually = [
        ("usually", "a mask of entries that the task does not need, or that others stand in for"),
        *_upside_down(result),
    ]
    if not result.replaced_inside:
        usually = [("why", "filling the mask changes no bit: its entries hold that already")]
    accept = [("to accept", f"min_drop={_at_most(result.drop)}")] if result.drop > 0 else []
    return facts(
        f"without the subnetwork the score drops by {value}, required {required}",
        [
            *_facts(result),
            ("claim", f"{of_what} the mask are needed"),
            *usually,
            *accept,
        ],
    )


def as_good_by_chance(result: SubnetworkScores, alpha: float) -> str:
    """The bound holds, and random masks of the same size do as well."""
    what, as_good = "score", "random ones score as high"
    if result.about == "complement":
        what, as_good = "drop", "random ones cost as much"
    p_value, allowed = number_against(result.p_value or 0.0, alpha)
    return facts(
        f"the {what} is no better than chance: {result.as_good:,} of {len(result.random):,} "
        f"{as_good}, p {p_value} above {allowed}",
        [
            *_facts(result),
            ("usually", "a score that any mask of this size reaches, or an evaluation that is too"),
            ("", "small to tell masks apart"),
            ("to accept", "controls=0, which asserts the bare number"),
        ],
    )


def _upside_down(result: SubnetworkScores) -> list[tuple[str, str]]:
    """A tuned model that scores lower than one with all filled: the score may be a loss."""
    if not result.full < result.filled:
        return []
    return [
        ("", "or evaluate gives a loss: the tuned model scores lower than all filled, and"),
        ("", "higher must be better (-loss)"),
    ]


def _facts(result: SubnetworkScores) -> list[tuple[str, str]]:
    lines = [
        *result.facts(),
        (
            "scores",
            f"full {result.full:.6g}, subnetwork {result.subnetwork:.6g}, complement "
            f"{result.complement:.6g}, all filled {result.filled:.6g}",
        ),
        (
            "replaced",
            f"{plural(result.replaced_inside, 'entry')} in the mask and "
            f"{result.replaced_outside:,} outside it get other bits when filled",
        ),
    ]
    if result.random:
        spread = "" if result.random_sd is None else f" (sd {result.random_sd:.3g})"
        lines.append(
            (
                "chance",
                f"{result.random_mean:.6g}{spread}, p {result.p_value:.3g}: "
                f"{len(result.random)} random {result.about}s with as many entries in each",
            )
        )
        lines.append(("", f"tensor, seed {result.seed}"))
    return lines


def _at_most(value: float) -> str:
    """A number as a lower bound that it meets, in few digits."""
    for digits in range(3, 17):
        near = float(f"{value:.{digits}g}")
        if near <= value:
            return repr(near)
    return repr(value)
