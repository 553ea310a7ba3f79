"""Whether a run forgot what it could do, and whether that came back (arXiv 2509.12235).

Accuracies are counts here, never two floats: 15.4 % of 234 episodes and of 23,400 say different
things. What is shown of one model by a few hundred trials is mostly luck, and the best of many
checkpoints is lucky by choice; both are in the numbers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, NamedTuple

from pytest_subnet.findings.common.bounds import check_fraction, check_message
from pytest_subnet.findings.common.result import Message, reworded
from pytest_subnet.findings.forgetting.counts import (
    Point,
    bounds_of_drop,
    check_alpha,
    check_count,
    fieller,
    fisher,
    read_curve,
    same_or_worse,
)
from pytest_subnet.findings.forgetting.texts import (
    forgot,
    may_have_forgotten,
    not_restored,
    not_shown,
    nothing_to_forget,
)
from pytest_subnet.recording import record
from pytest_subnet.tables import table
from pytest_subnet.text import facts, percent, plural

if TYPE_CHECKING:
    from pytest_subnet.findings.forgetting.counts import Count, Curve


class Drop(NamedTuple):
    """From one checkpoint to the last one.

    Attributes:
        step: of the earlier checkpoint.
        successes: its items that came out right.
        trials: its items.
        drop: its rate minus that of the last checkpoint, in [-1, 1].
        drop_upper: the upper confidence bound of that.
        p_value: of the exact test that both have one rate: Fisher's, McNemar's where paired.
    """

    step: int
    successes: int
    trials: int
    drop: float
    drop_upper: float
    p_value: float

    @property
    def rate(self) -> float:
        """Share of its items that came out right."""
        return self.successes / self.trials


@dataclass(frozen=True, slots=True, repr=False)
class OODForgetting:
    """How far the last checkpoint of a curve is below the best one before it.

    Attributes:
        per_checkpoint: each checkpoint but the last, and how far the last one is below it.
        last_step: of the last checkpoint.
        last_successes: its items that came out right.
        last_trials: its items.
        alpha: the error that the bound allows.
        paired: whether every checkpoint was tried on the same items.
    """

    per_checkpoint: tuple[Drop, ...]
    last_step: int
    last_successes: int
    last_trials: int
    alpha: float
    paired: bool

    @property
    def peak(self) -> Drop:
        """The checkpoint with the best rate, the first of several."""
        return max(self.per_checkpoint, key=lambda each: each.rate)

    @property
    def last_rate(self) -> float:
        """Share of the last checkpoint's items that came out right."""
        return self.last_successes / self.last_trials

    @property
    def drop(self) -> float:
        """The rate of the peak minus that of the last checkpoint; below 0 if the last is best.

        Too large by the luck of the peak, which was picked for it.
        """
        return self.peak.drop

    @property
    def drop_upper(self) -> float:
        """With confidence 1 - alpha no checkpoint's true rate is further above the last one's.

        The largest of the single bounds: to show that all drops are small, each must be shown to
        be, and the error of that is no larger than that of the worst (an intersection-union test).
        """
        return max(each.drop_upper for each in self.per_checkpoint)

    @property
    def p_value(self) -> float:
        """Of the peak's exact test, two-sided, times the checkpoints it was picked from."""
        return min(1.0, self.peak.p_value * len(self.per_checkpoint))

    def rows(self) -> list[dict[str, object]]:
        """One row a checkpoint."""
        earlier = [
            {
                "step": each.step,
                "right": f"{each.successes:,}",
                "of": f"{each.trials:,}",
                "rate": percent(each.rate),
                "drop to last": f"{each.drop * 100:+.2f} points",
                "at most": f"{each.drop_upper * 100:+.2f} points",
                "p": f"{each.p_value:.3g}",
            }
            for each in self.per_checkpoint
        ]
        last: dict[str, object] = {
            "step": self.last_step,
            "right": f"{self.last_successes:,}",
            "of": f"{self.last_trials:,}",
            "rate": percent(self.last_rate),
            "drop to last": "",
            "at most": "",
            "p": "",
        }
        return [*earlier, last]

    def table(self) -> str:
        """The rows as text, under what was tested."""
        numbers = ["step", "right", "of", "rate", "drop to last", "at most", "p"]
        test = "McNemar's exact test" if self.paired else "Fisher's exact test"
        lines = [
            (
                "p",
                f"{self.p_value:.3g} for the peak: {test}, times "
                f"{plural(len(self.per_checkpoint), 'checkpoint')} it was picked from",
            )
        ]
        return f"{facts(repr(self), lines)}\n\n{table(self.rows(), right=numbers)}"

    def to_dict(self) -> dict[str, object]:
        """Plain JSON types, for reports and baselines."""
        return {
            "finding": "ood_forgetting",
            "drop": self.drop,
            "drop_upper": self.drop_upper,
            "p_value": self.p_value,
            "peak_step": self.peak.step,
            "peak_rate": self.peak.rate,
            "last_step": self.last_step,
            "last_rate": self.last_rate,
            "alpha": self.alpha,
            "paired": self.paired,
            "steps": [*(each.step for each in self.per_checkpoint), self.last_step],
            "rates": [*(each.rate for each in self.per_checkpoint), self.last_rate],
        }

    def __repr__(self) -> str:
        """One line that reads well in a failed `assert`."""
        return (
            f"OODForgetting(drop={self.drop:.4g}, drop_upper={self.drop_upper:.4g}, "
            f"p_value={self.p_value:.3g}, peak at step {self.peak.step} of "
            f"{plural(len(self.per_checkpoint) + 1, 'checkpoint')})"
        )


def ood_forgetting(curve: Curve, *, alpha: float = 0.05) -> OODForgetting:
    """Measure how far the last checkpoint is below the best one before it.

    Args:
        curve: one row a checkpoint, at least three: `(step, successes, trials)`, or
            `(step, outcomes)` with what came of the same items each time, as booleans in one order
            or as a mapping from item to boolean. The last one has the largest step.
        alpha: the error that the upper bound of the drop allows, in (0, 0.5).

    Returns:
        The drop, its upper bound and its p-value, and the same for each checkpoint.

    Raises:
        ValueError: fewer than three checkpoints, no trials, more successes than trials, a step
            twice, other items at another checkpoint, or rows of both forms.
        TypeError: counts that are no integers, outcomes that are no booleans.

    Source: the curves of arXiv 2509.12235, whose accuracies carry no test. Bounds: Newcombe,
    Statistics in Medicine 17 (1998), 873-890, method 10, and 2635-2650, method 10, where paired.

    >>> llama = ood_forgetting([(140, 41, 234), (620, 30, 234), (1100, 21, 234)])
    >>> print(f"{llama.drop:.4f} lost, at most {llama.drop_upper:.4f}, p = {llama.p_value:.4f}")
    0.0855 lost, at most 0.1371, p = 0.0183
    """
    check_alpha(alpha)
    points = read_curve(curve)
    *earlier, last = points
    result = OODForgetting(
        per_checkpoint=tuple(_drop(each, last, alpha) for each in earlier),
        last_step=last.step,
        last_successes=last.successes,
        last_trials=last.trials,
        alpha=alpha,
        paired=last.outcomes is not None,
    )
    record(result)
    return result


def _drop(earlier: Point, last: Point, alpha: float) -> Drop:
    return Drop(
        step=earlier.step,
        successes=earlier.successes,
        trials=earlier.trials,
        drop=float(Fraction(*earlier.counted) - Fraction(*last.counted)),
        drop_upper=bounds_of_drop(earlier, last, alpha)[1],
        p_value=same_or_worse(earlier, last),
    )


def assert_no_forgetting(
    curve: Curve, *, max_drop: float, alpha: float = 0.05, message: Message | None = None
) -> OODForgetting:
    """Fail unless the last checkpoint is shown not to be much below any before it.

    A gate, not a test of significance: too few trials show nothing, and fail. It holds when the
    upper confidence bound of the drop is below `max_drop`.

    Valid usages:
        assert_no_forgetting([(100, 812, 1000), (200, 820, 1000), (300, 815, 1000)], max_drop=0.05)
        assert_no_forgetting([(s, outcomes[s]) for s in steps], max_drop=0.02)   # the same items

    Args:
        curve: as in `ood_forgetting`.
        max_drop: fraction in (0, 1]: how much of the accuracy may be lost, 0.05 for five points.
        alpha: as in `ood_forgetting`.
        message: rewords a failure.

    Returns:
        What `ood_forgetting` measured.

    Raises:
        AssertionError: the bound is not below `max_drop`; or the peak itself is not above it, so
            that a model that lost everything would pass.
        ValueError: `max_drop` outside (0, 1]; or as in `ood_forgetting`.
        TypeError: as in `ood_forgetting`.

    Source: as `ood_forgetting`.

    >>> steady = [(100, 812, 1000), (200, 820, 1000), (300, 815, 1000)]
    >>> assert_no_forgetting(steady, max_drop=0.05).drop
    0.005
    """
    __tracebackhide__ = True
    check_fraction("max_drop", max_drop)
    if max_drop == 0:
        raise ValueError("max_drop=0: no number of trials can show that nothing at all was lost")
    check_message(message)
    result = ood_forgetting(curve, alpha=alpha)
    text = None
    if result.peak.rate <= max_drop:
        text = nothing_to_forget(result, max_drop)
    elif result.drop > max_drop:
        text = forgot(result, max_drop)
    elif result.drop_upper >= max_drop:
        text = may_have_forgotten(result, max_drop)
    if text is not None:
        raise AssertionError(reworded(text, message))
    return result


@dataclass(frozen=True, slots=True, repr=False)
class OODRestored:
    """How much of what was forgotten came back.

    Attributes:
        peak: `(successes, trials)` at the best checkpoint.
        forgotten: the same where it was forgotten.
        restored: the same after it was restored.
        fraction: (restored - forgotten) / (peak - forgotten), of the rates.
        interval: confidence interval of `fraction`, with confidence 1 - alpha; an end is None where
            it has none, both where the forgetting itself may be luck.
        forgotten_p: two-sided p-value of peak against forgotten, Fisher's exact test.
        restored_p: the same of forgotten against restored.
        alpha: the error that interval and tests allow.
    """

    peak: Count
    forgotten: Count
    restored: Count
    fraction: float
    interval: tuple[float | None, float | None]
    forgotten_p: float
    restored_p: float
    alpha: float

    def rows(self) -> list[dict[str, object]]:
        """One row a checkpoint."""
        rows = zip(
            ("peak", "forgotten", "restored"),
            (self.peak, self.forgotten, self.restored),
            ("", f"{self.forgotten_p:.3g}", f"{self.restored_p:.3g}"),
            strict=True,
        )
        return [
            {
                "checkpoint": name,
                "right": f"{successes:,}",
                "of": f"{trials:,}",
                "rate": percent(successes / trials),
                "p": p_value,
            }
            for name, (successes, trials), p_value in rows
        ]

    def table(self) -> str:
        """The rows as text, under the fraction and its interval."""
        lines = [("interval", self.spelt_interval())]
        return f"{facts(repr(self), lines)}\n\n{table(self.rows(), right=['right', 'of', 'rate'])}"

    def spelt_interval(self) -> str:
        """The interval in words."""
        low, high = ("?" if end is None else percent(end) for end in self.interval)
        return f"{low} to {high} with confidence {percent(1 - self.alpha, 0)}"

    def to_dict(self) -> dict[str, object]:
        """Plain JSON types, for reports and baselines."""
        return {
            "finding": "ood_restored",
            "fraction": self.fraction,
            "fraction_lower": self.interval[0],
            "fraction_upper": self.interval[1],
            "forgotten_p": self.forgotten_p,
            "restored_p": self.restored_p,
            "peak": list(self.peak),
            "forgotten": list(self.forgotten),
            "restored": list(self.restored),
            "alpha": self.alpha,
        }

    def __repr__(self) -> str:
        """One line that reads well in a failed `assert`."""
        return (
            f"OODRestored(fraction={self.fraction:.4g}, forgotten_p={self.forgotten_p:.3g}, "
            f"restored_p={self.restored_p:.3g})"
        )


def ood_restored(
    peak: Count, forgotten: Count, restored: Count, *, alpha: float = 0.05
) -> OODRestored:
    """Measure how much of what was forgotten came back.

    Args:
        peak: `(successes, trials)` at the best checkpoint; picked on other items than these, or
            the fraction is too small.
        forgotten: the same where it was forgotten.
        restored: the same after it was restored.
        alpha: the error that interval and tests allow, in (0, 0.5).

    Returns:
        The fraction, its interval and the p-values of both steps.

    Raises:
        ValueError: the peak is not above what was forgotten; no trials, more successes than trials.
        TypeError: counts that are no integers.

    Source: the restored fraction of arXiv 2509.12235; the interval is Fieller's (1954).

    >>> ood_restored((41, 234), (21, 234), (36, 234))  # Llama: 17.5 %, 9.0 %, 15.4 %
    OODRestored(fraction=0.75, forgotten_p=0.00916, restored_p=0.0471)
    """
    check_alpha(alpha)
    for name, count in (("peak", peak), ("forgotten", forgotten), ("restored", restored)):
        check_count(name, count)
    top, low, back = (Fraction(*count) for count in (peak, forgotten, restored))
    if top <= low:
        raise ValueError(
            f"peak {percent(float(top))} is not above forgotten {percent(float(low))}: nothing was "
            "forgotten, and of nothing no fraction can come back"
        )
    result = OODRestored(
        peak=(peak[0], peak[1]),
        forgotten=(forgotten[0], forgotten[1]),
        restored=(restored[0], restored[1]),
        fraction=float((back - low) / (top - low)),
        interval=fieller(peak, forgotten, restored, alpha),
        forgotten_p=fisher(peak, forgotten),
        restored_p=fisher(restored, forgotten),
        alpha=alpha,
    )
    record(result)
    return result


def assert_ood_restored(
    peak: Count,
    forgotten: Count,
    restored: Count,
    *,
    min_fraction: float,
    alpha: float = 0.05,
    message: Message | None = None,
) -> OODRestored:
    """Fail unless what was forgotten came back, and neither step can be put down to luck.

    Valid usages:
        assert_ood_restored((41, 234), (21, 234), (36, 234), min_fraction=0.7)

    Args:
        peak: as in `ood_restored`.
        forgotten: as in `ood_restored`.
        restored: as in `ood_restored`.
        min_fraction: the least that must have come back; 1 for all of it, and more is possible.
        alpha: p-values at or above it are luck, in (0, 0.5).
        message: rewords a failure.

    Returns:
        What `ood_restored` measured.

    Raises:
        AssertionError: less came back; or the forgetting or the restoring is not significant.
        ValueError: `min_fraction` is not a finite number above 0; or as in `ood_restored`.
        TypeError: as in `ood_restored`.

    Source: as `ood_restored`.

    >>> assert_ood_restored((41, 234), (21, 234), (36, 234), min_fraction=0.7).fraction
    0.75
    """
    __tracebackhide__ = True
    if isinstance(min_fraction, bool) or not isinstance(min_fraction, int | float):
        raise TypeError(f"min_fraction={min_fraction!r} is not a number")
    if not 0 < min_fraction < math.inf:
        raise ValueError(f"min_fraction={min_fraction!r} is not a finite number above 0")
    check_message(message)
    result = ood_restored(peak, forgotten, restored, alpha=alpha)
    text = None
    if result.fraction < min_fraction:
        text = not_restored(result, min_fraction)
    elif result.forgotten_p >= alpha or result.restored_p >= alpha:
        text = not_shown(result, min_fraction)
    if text is not None:
        raise AssertionError(reworded(text, message))
    return result
