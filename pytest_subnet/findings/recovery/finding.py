"""Whether training inside a mask arrives where full training did (arXiv 2505.11711, section 4)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

from pytest_subnet.checkpoints.opening import open_checkpoint
from pytest_subnet.errors import SelectionError, SubnetError
from pytest_subnet.findings.common.bounds import (
    check_fraction,
    check_limit,
    check_message,
    warn_of_vacuous,
)
from pytest_subnet.findings.common.result import reworded
from pytest_subnet.findings.recovery.counts import ThreeAligned
from pytest_subnet.findings.recovery.texts import (
    diverged,
    not_recovered,
    nothing_to_recover,
    outside_moved,
    score_dropped,
    too_wide,
)
from pytest_subnet.masks.update_mask import UpdateMask
from pytest_subnet.recording import record
from pytest_subnet.scan.tolerance import Tolerance
from pytest_subnet.tables import table
from pytest_subnet.text import facts, percent, safe

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from pytest_subnet.checkpoints.opening import Source
    from pytest_subnet.findings.common.result import Coverage, Message
    from pytest_subnet.findings.recovery.counts import Recovered
    from pytest_subnet.pairs.selection import Patterns

    Score: TypeAlias = Callable[[Source], float]

Null: TypeAlias = Literal["base"] | None


@dataclass(frozen=True, slots=True, repr=False)
class SubnetworkRecovery:
    """How far the values of sub, trained inside a mask, are those of full.

    With a NaN or Inf of full nothing agrees, not even the same bits.

    Attributes:
        coverage: which checkpoints, tolerance, dtype, tensors and entries.
        mask: what the mask was made from.
        inside: entries in the mask.
        matching: of these, in which sub agrees with full within the tolerance.
        missed: entries in the mask in which the base does not agree with full.
        regained: of these, in which sub does.
        matching_everywhere: entries, in and out of the mask, in which sub agrees.
        base_matching_everywhere: likewise the base.
        outside_moved: entries outside the mask with other bits in sub than in the base.
        full_moved: entries, in and out of the mask, with other bits in full than in the base.
        nonfinite_full: NaN and Inf in full, in and out of the mask.
        nonfinite_inside: of these, in the mask.
        nonfinite_sub: NaN and Inf in sub, in and out of the mask.
        per_tensor: the tensors compared, as `Recovered`.
        full_score: the task score of full, where one was asked for.
        sub_score: of sub.
        base_score: of the base.
    """

    coverage: Coverage
    mask: str
    inside: int
    matching: int
    missed: int
    regained: int
    matching_everywhere: int
    base_matching_everywhere: int
    outside_moved: int
    full_moved: int
    nonfinite_full: int
    nonfinite_inside: int
    nonfinite_sub: int
    per_tensor: tuple[Recovered, ...]
    full_score: float | None = None
    sub_score: float | None = None
    base_score: float | None = None

    @property
    def numel(self) -> int:
        """Entries compared, in and out of the mask."""
        return self.coverage.numel

    @property
    def tolerance(self) -> Tolerance:
        """Within which two values agree."""
        return self.coverage.tolerance

    @property
    def fingerprints(self) -> Mapping[str, str]:
        """Of the content of base, full and sub; each is taken when it is asked for."""
        return self.coverage.fingerprints

    @property
    def match(self) -> float:
        """Share of the mask in which sub agrees with full."""
        return self.matching / self.inside

    @property
    def base_match(self) -> float:
        """Share of the mask in which the base agrees with full, without any training."""
        return (self.inside - self.missed) / self.inside

    @property
    def recovered(self) -> float | None:
        """Share of the entries in which the base does not agree, and sub does.

        None where the base agrees everywhere in the mask.
        """
        return self.regained / self.missed if self.missed else None

    @property
    def whole_match(self) -> float:
        """Share of all entries in which sub agrees with full: the number the paper prints."""
        return self.matching_everywhere / self.numel

    @property
    def base_whole_match(self) -> float:
        """Share of all entries in which the base agrees with full."""
        return self.base_matching_everywhere / self.numel

    @property
    def nonfinite(self) -> int:
        """NaN and Inf of full and sub together."""
        return self.nonfinite_full + self.nonfinite_sub

    def rows(self) -> list[dict[str, object]]:
        """One row a tensor, for tables and reports."""
        return [
            {
                "tensor": each.name,
                "entries": f"{each.numel:,}",
                "in mask": f"{each.inside:,}",
                "match": "" if each.match is None else percent(each.match),
                "base misses": f"{each.missed:,}",
                "recovered": "" if each.recovered is None else percent(each.recovered),
                "outside moved": f"{each.outside_moved:,}",
            }
            for each in self.per_tensor
        ]

    def table(self) -> str:
        """The rows as text, under a line that says what was measured."""
        numbers = ["entries", "in mask", "match", "base misses", "recovered", "outside moved"]
        return f"{facts(repr(self), self.coverage.rows())}\n\n{table(self.rows(), right=numbers)}"

    def to_dict(self) -> dict[str, object]:
        """Plain JSON types, for reports and baselines."""
        return {
            "finding": "subnetwork_recovery",
            "mask": self.mask,
            "match": self.match,
            "base_match": self.base_match,
            "recovered": self.recovered,
            "whole_match": self.whole_match,
            "base_whole_match": self.base_whole_match,
            "inside": self.inside,
            "missed": self.missed,
            "outside_moved": self.outside_moved,
            "full_moved": self.full_moved,
            "nonfinite_full": self.nonfinite_full,
            "nonfinite_inside": self.nonfinite_inside,
            "nonfinite_sub": self.nonfinite_sub,
            "full_score": self.full_score,
            "sub_score": self.sub_score,
            "base_score": self.base_score,
            **self.coverage.to_dict(),
        }

    def __repr__(self) -> str:
        """One line that reads well in a failed `assert`."""
        recovered = "None" if self.recovered is None else f"{self.recovered:.6g}"
        return (
            f"SubnetworkRecovery(recovered={recovered}, match={self.match:.6g}, "
            f"base_match={self.base_match:.6g}, {self.inside:,} of {self.numel:,} in the mask, "
            f"{self.tolerance})"
        )


def subnetwork_recovery(
    full: Source,
    sub: Source,
    *,
    base: Source,
    atol: float,
    mask: UpdateMask | None = None,
    score: Score | None = None,
    include: Patterns | None = None,
    exclude: Patterns | None = None,
    kinds: Patterns | None = None,
    as_dtype: str | None = None,
) -> SubnetworkRecovery:
    """Measure how far a model trained inside a mask has the values of one trained in full.

    Two values agree when |sub - full| <= atol; nothing agrees with a NaN or Inf of full. Outside
    the mask they agree by construction, so the numbers to read are those inside: `.match`, beside
    `.base_match`, which needs no training, and `.recovered`, over the entries in which the base
    does not agree.

    Args:
        full: the model after full training; anything `open_checkpoint` takes.
        sub: after training from the same base inside the mask; likewise.
        base: the model before both.
        atol: in weight units; the paper's are 1e-5 and 1e-4.
        mask: the one that was trained inside, over tensors as the base calls them; None takes the
            entries with other bits in full than in the base, the paper's.
        score: a task score of a model, higher is better: called with `full`, `sub` and `base` as
            they were given.
        include: glob or globs on base names; None takes all.
        exclude: glob or globs on base names to leave out.
        kinds: kind or kinds.
        as_dtype: cast all three before they are compared, as in `open_pair`.

    Returns:
        The counts, in all and per tensor. Everything is read by the scan, bits are kept packed.

    Raises:
        SelectionError: a pattern matches nothing, no weights are left, or the mask has no entry in
            what is.
        PairMismatchError: the checkpoints, or the mask, are not of one model, or two are the same.
        SubnetError: a score is not a finite number.
        ValueError: `atol` is negative or not finite.

    Source: arXiv 2505.11711, section 4 (there over all entries: 94.0 % and 90.5 % at 1e-5).

    >>> base = {"w": torch.zeros(4)}
    >>> full = {"w": torch.tensor([1.0, 1.0, 1.0, 0.0])}
    >>> sub = {"w": torch.tensor([1.0, 1.0, 0.5, 0.0])}
    >>> subnetwork_recovery(full, sub, base=base, atol=1e-5)
    SubnetworkRecovery(recovered=0.666667, match=0.666667, base_match=0, 3 of 4 in the mask, ...)
    """
    result = _measured(full, sub, base, atol, mask, score, (include, exclude, kinds), as_dtype)
    _check_covered(result)
    record(result)
    return result


def assert_subnetwork_recovers(
    full: Source,
    sub: Source,
    *,
    base: Source,
    match_at_least: float,
    atol: float,
    mask: UpdateMask | None = None,
    null: Null = "base",
    score: Score | None = None,
    max_score_drop: float = 0.0,
    allow_outside: bool = False,
    include: Patterns | None = None,
    exclude: Patterns | None = None,
    kinds: Patterns | None = None,
    as_dtype: str | None = None,
    message: Message | None = None,
) -> SubnetworkRecovery:
    """Fail unless training inside a mask arrived at the values of full training.

    The bound applies to what the base does not explain: of the entries in the mask in which the
    base differs from full by more than `atol`, the share in which sub does not. With `null=None`
    it applies to all entries in the mask.

    Valid usages:
        assert_subnetwork_recovers(full, sub, base=base, match_at_least=0.9, atol=1e-5)
        assert_subnetwork_recovers(full, sub, base=base, mask=mask, match_at_least=0.9, atol=1e-5,
                                   score=accuracy, max_score_drop=0.02)

    Args:
        full: as in `subnetwork_recovery`.
        sub: likewise.
        base: likewise.
        match_at_least: fraction in [0, 1].
        atol: within which two values agree, in weight units.
        mask: as in `subnetwork_recovery`.
        null: `"base"`: what agrees without training does not count; None: all that agrees does.
        score: as in `subnetwork_recovery`.
        max_score_drop: how far below full's the score of sub may be.
        allow_outside: accept a sub that moved outside the mask, as under
            `train_inside(..., gradients_only=True)` with weight decay.
        include: as in `subnetwork_recovery`.
        exclude: likewise.
        kinds: likewise.
        as_dtype: likewise.
        message: rewords a failure.

    Returns:
        What `subnetwork_recovery` measured.

    Raises:
        AssertionError: too little agrees, the base agrees everywhere (with `null="base"`), sub
            moved outside the mask, full has the bits of the base everywhere or a NaN or Inf in the
            mask, or the score dropped.
        SelectionError: as in `subnetwork_recovery`.
        PairMismatchError: likewise.
        SubnetError: likewise.
        ValueError: a bound outside its range, or an unknown `null`.

    Source: arXiv 2505.11711, section 4, Conjecture 1.

    >>> base = {"w": torch.zeros(4)}
    >>> full = {"w": torch.tensor([1.0, 1.0, 1.0, 0.0])}
    >>> sub = {"w": torch.tensor([1.0, 1.0, 0.5, 0.0])}
    >>> assert_subnetwork_recovers(full, sub, base=base, match_at_least=0.6, atol=1e-5).whole_match
    0.75
    """
    __tracebackhide__ = True
    check_fraction("match_at_least", match_at_least)
    check_limit("max_score_drop", max_score_drop)
    check_message(message)
    if null not in ("base", None):
        raise ValueError(f"null={safe(repr(null))} is not one of 'base', None")
    result = _measured(full, sub, base, atol, mask, score, (include, exclude, kinds), as_dtype)
    if not result.inside and mask is None:
        raise AssertionError(reworded(nothing_to_recover(result), message))
    _check_covered(result)
    record(result)
    text = None
    judged = result.recovered if null == "base" else result.match
    if not result.full_moved:
        text = nothing_to_recover(result)
    elif result.nonfinite_inside:
        text = diverged(result)
    elif result.outside_moved and not allow_outside:
        text = outside_moved(result)
    elif judged is None:
        text = too_wide(result)
    elif judged < match_at_least:
        text = not_recovered(result, judged, match_at_least, against_base=null == "base")
    elif _dropped(result, max_score_drop):
        text = score_dropped(result, max_score_drop)
    if text is not None:
        raise AssertionError(reworded(text, message))
    if score is None:  # else a bound of 0 leaves the verdict to the score
        warn_of_vacuous("assert_subnetwork_recovers", match_at_least=match_at_least)
    return result


def _dropped(result: SubnetworkRecovery, allowed: float) -> bool:
    full, sub = result.full_score, result.sub_score
    return full is not None and sub is not None and full - sub > allowed


def _measured(
    full: Source,
    sub: Source,
    base: Source,
    atol: float,
    mask: UpdateMask | None,
    score: Score | None,
    patterns: tuple[Patterns | None, Patterns | None, Patterns | None],
    as_dtype: str | None,
) -> SubnetworkRecovery:
    check_limit("atol", atol)
    if mask is not None and not isinstance(mask, UpdateMask):
        raise TypeError(f"mask is {type(mask).__name__}, not an UpdateMask; load it with .load()")
    if score is not None and not callable(score):
        raise TypeError(f"score={safe(repr(score))} is not a function from a model to its score")
    three = ThreeAligned(
        full=open_checkpoint(full),
        sub=open_checkpoint(sub),
        base=open_checkpoint(base),
        patterns=patterns,
        as_dtype=as_dtype,
    )
    tensors = three.count(atol, mask)
    scores = [None if score is None else _scored(score, each) for each in (full, sub, base)]
    return SubnetworkRecovery(
        coverage=three.coverage(Tolerance(atol=atol)),
        mask="the update of full (same bits)" if mask is None else mask.origin.what,
        inside=sum(each.inside for each in tensors),
        matching=sum(each.matching for each in tensors),
        missed=sum(each.missed for each in tensors),
        regained=sum(each.regained for each in tensors),
        matching_everywhere=sum(each.matching_everywhere for each in tensors),
        base_matching_everywhere=sum(each.base_matching_everywhere for each in tensors),
        outside_moved=sum(each.outside_moved for each in tensors),
        full_moved=sum(each.full_moved for each in tensors),
        nonfinite_full=sum(each.nonfinite_full for each in tensors),
        nonfinite_inside=sum(each.nonfinite_inside for each in tensors),
        nonfinite_sub=sum(each.nonfinite_sub for each in tensors),
        per_tensor=tuple(tensors),
        full_score=scores[0],
        sub_score=scores[1],
        base_score=scores[2],
    )


def _check_covered(result: SubnetworkRecovery) -> None:
    if not result.inside:
        raise SelectionError(
            f"the mask of {result.mask} has no entry in what is compared: {result.coverage.pair}"
        )


def _scored(score: Score, source: Source) -> float:
    value = score(source)
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise SubnetError(f"score gave {safe(repr(value))}, which is no finite number to compare")
    return number
