"""What a failed assertion on forgetting says."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pytest_subnet.findings.common.wording import limit_above, share_against
from pytest_subnet.findings.forgetting.counts import enough_trials, spelt
from pytest_subnet.text import facts, percent, plural

if TYPE_CHECKING:
    from pytest_subnet.findings.forgetting.finding import OODForgetting, OODRestored


def forgot(result: OODForgetting, max_drop: float) -> str:
    """The drop itself is too large."""
    drop, bound = share_against(result.drop, max_drop)
    return facts(
        f"forgetting {drop} is above the allowed {bound}",
        [
            *_curve(result),
            (
                "usually",
                "training went on past its peak; release an earlier checkpoint",
            ),
            ("to accept", f"max_drop={limit_above(result.drop_upper)}"),
        ],
    )


def may_have_forgotten(result: OODForgetting, max_drop: float) -> str:
    """The drop is small, but the trials do not show it."""
    upper, bound = share_against(result.drop_upper, max_drop)
    worst = max(result.per_checkpoint, key=lambda each: each.drop_upper)
    last = (result.last_successes, result.last_trials)
    enough = enough_trials((worst.successes, worst.trials), last, max_drop, result.alpha)
    advice = "no number of trials would show it at these rates"
    if enough is not None:
        advice = f"about {plural(enough, 'trial')} a checkpoint would show it at these rates"
    return facts(
        f"forgetting may be {upper}, not below the allowed {bound}: too few trials",
        [
            *_curve(result),
            ("trials", advice),
            ("to accept", f"max_drop={limit_above(result.drop_upper)}"),
        ],
    )


def nothing_to_forget(result: OODForgetting, max_drop: float) -> str:
    """The peak is so low that any drop would do."""
    rate, bound = share_against(result.peak.rate, max_drop)
    return facts(
        f"the peak of {rate} is not above the allowed drop of {bound}: "
        "a model that lost everything would pass",
        [
            *_curve(result),
            ("instead", "a max_drop below the peak, or items that the model can do"),
        ],
    )


def not_restored(result: OODRestored, min_fraction: float) -> str:
    """Too little came back."""
    fraction, bound = share_against(result.fraction, min_fraction)
    return facts(f"restored {fraction} is below the required {bound}", _steps(result))


def not_shown(result: OODRestored, min_fraction: float) -> str:
    """Enough came back, but it may be luck."""
    step, p_value = "restoring", result.restored_p
    if result.forgotten_p >= result.alpha:
        step, p_value = "forgetting", result.forgotten_p
    return facts(
        f"restored {percent(result.fraction)} meets {percent(min_fraction)}, but the {step} may be "
        f"luck: p = {p_value:.2g}, not below {result.alpha:g}",
        [*_steps(result), ("usually", "too few trials for a difference of this size")],
    )


def _curve(result: OODForgetting) -> list[tuple[str, str]]:
    peak, last = result.peak, (result.last_successes, result.last_trials)
    test = "McNemar's exact test" if result.paired else "Fisher's exact test"
    picked = plural(len(result.per_checkpoint), "checkpoint")
    return [
        (
            "peak",
            f"{spelt((peak.successes, peak.trials))} at step {peak.step}, picked from {picked}",
        ),
        ("last", f"{spelt(last)} at step {result.last_step}"),
        (
            "at most",
            f"{percent(result.drop_upper)} lost, with confidence {percent(1 - result.alpha, 0)}",
        ),
        ("p", f"{result.p_value:.2g} ({test}, times {picked})"),
    ]


def _steps(result: OODRestored) -> list[tuple[str, str]]:
    return [
        ("peak", spelt(result.peak)),
        ("forgotten", f"{spelt(result.forgotten)}, p = {result.forgotten_p:.2g} against the peak"),
        ("restored", f"{spelt(result.restored)}, p = {result.restored_p:.2g} against forgotten"),
        ("interval", result.spelt_interval()),
    ]
