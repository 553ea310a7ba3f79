"""What an overlap of two masks is, in numbers."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from pytest_subnet.findings.common.chance import Interval, lift_interval
from pytest_subnet.findings.common.result import finite_or_none
from pytest_subnet.tables import table
from pytest_subnet.text import facts, percent

if TYPE_CHECKING:
    from collections.abc import Mapping


class TensorOverlap(NamedTuple):
    """How the masks overlap in one tensor.

    Attributes:
        name: its name in the base.
        shape: of the tensor.
        dtype: of its weights; `"bool"` where no mask knows.
        layer: the number of its block; None outside the blocks.
        kind: what it is for.
        numel: its entries.
        count_a: those in a.
        count_b: those in b.
        intersection: those in both.
        expected: what the result's null expects of `intersection`; None without a null.
        variance: of that; None where the null has no closed form for it.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    layer: int | None
    kind: str
    numel: int
    count_a: int
    count_b: int
    intersection: int
    expected: float | None
    variance: float | None

    @property
    def jaccard(self) -> float | None:
        """Entries in both over entries in either; None where there are none."""
        union = self.count_a + self.count_b - self.intersection
        return self.intersection / union if union else None

    @property
    def lift(self) -> float | None:
        """Intersection over its expectation; None where nothing is expected."""
        return self.intersection / self.expected if self.expected else None

    @property
    def z(self) -> float | None:
        """Standard deviations above the expectation; None where nothing is left to chance."""
        return _z(self.intersection, self.expected, self.variance)


@dataclass(frozen=True, slots=True, repr=False)
class MaskOverlap:
    """How far two masks cover the same entries, and how far chance does.

    Attributes:
        null: what chance keeps fixed: `"exponent"`, `"matrix"`, `"rowcol"` or `"pooled"`; None for
            the bare number, and then all that is corrected for chance is None.
        a: what one mask was made from, in words.
        b: what the other was made from.
        dtype: of the weights; several are joined by `+`.
        tensors_total: how many tensors the masks have, selected or not.
        numel: entries of the selected tensors.
        count_a: those in a.
        count_b: those in b.
        intersection: those in both.
        expected: what the null expects of `intersection`.
        variance: of that; None where the null has no closed form (`"rowcol"`).
        ceiling: the largest intersection that the counts in the null's strata allow.
        odds_ratio: Mantel and Haenszel's over matrices, over the whole model where the null is
            `"pooled"`: odds to be in b for entries in a, over those for entries not in a.
        lifts: the lift under every null that could be had, by name.
        pooled_expected: what `"pooled"` expects, whatever the null.
        strata: into how many parts the null cuts the entries.
        degenerate: those in which a mask is empty or full, so that nothing is left to chance; they
            count in `expected` and add nothing to `z`.
        nonfinite_a: NaN and Inf in the base and the tuned checkpoint of the pair `a`, of which each
            that changed counts as updated; None where `a` is a mask or a file, which do not know.
        nonfinite_b: likewise.
        per_tensor: the same tensor by tensor, as `TensorOverlap`.
        fingerprints: of the bases and the tuned checkpoints of both masks (`base_a`, …), empty
            where a mask does not know; each is taken when it is asked for.
    """

    null: str | None
    a: str
    b: str
    dtype: str
    tensors_total: int
    numel: int
    count_a: int
    count_b: int
    intersection: int
    expected: float | None
    variance: float | None
    ceiling: int | None
    odds_ratio: float | None
    lifts: dict[str, float]
    pooled_expected: float
    strata: int
    degenerate: int
    nonfinite_a: int | None
    nonfinite_b: int | None
    per_tensor: tuple[TensorOverlap, ...]
    fingerprints: Mapping[str, str] = field(default_factory=dict, compare=False, repr=False)

    @property
    def one_sided_a(self) -> float:
        """Share of a that is in b (the paper's o1)."""
        return self.intersection / self.count_a

    @property
    def one_sided_b(self) -> float:
        """Share of b that is in a (the paper's o2)."""
        return self.intersection / self.count_b

    @property
    def one_sided(self) -> float:
        """The smaller of the two."""
        return self.intersection / max(self.count_a, self.count_b)

    @property
    def jaccard(self) -> float:
        """Entries in both over entries in either."""
        return self.intersection / (self.count_a + self.count_b - self.intersection)

    @property
    def dice(self) -> float:
        """Twice the entries in both over the entries of a and of b."""
        return 2 * self.intersection / (self.count_a + self.count_b)

    @property
    def z(self) -> float | None:
        """Standard deviations above what the null expects; None where it has no variance."""
        return _z(self.intersection, self.expected, self.variance)

    @property
    def lift(self) -> float | None:
        """Intersection over what the null expects; None where it expects nothing."""
        return self.intersection / self.expected if self.expected else None

    @property
    def kappa(self) -> float | None:
        """Share of the way from chance to the most that the counts allow; 1 is nested masks.

        None where chance and the most are the same.
        """
        if self.expected is None or self.ceiling is None or self.ceiling <= self.expected:
            return None
        return (self.intersection - self.expected) / (self.ceiling - self.expected)

    @property
    def jaccard_by_chance(self) -> float | None:
        """The Jaccard index at the intersection that the null expects."""
        if self.expected is None:
            return None
        return self.expected / (self.count_a + self.count_b - self.expected)

    @property
    def one_sided_by_chance(self) -> float | None:
        """The smaller one-sided overlap at the intersection that the null expects."""
        return None if self.expected is None else self.expected / max(self.count_a, self.count_b)

    @property
    def saturated(self) -> bool:
        """Whether a mask is empty or full in every stratum: chance alone fixes the overlap."""
        return self.degenerate == self.strata

    @property
    def identical(self) -> bool:
        """Whether the masks hold the same bits."""
        return all(each.count_a == each.count_b == each.intersection for each in self.per_tensor)

    @property
    def nonfinite(self) -> int | None:
        """NaN and Inf in the pairs; None where neither a nor b is a pair."""
        known = [each for each in (self.nonfinite_a, self.nonfinite_b) if each is not None]
        return sum(known) if known else None

    @property
    def interval(self) -> Interval | None:
        """The lift's 95 % interval over matrices; None with fewer than three, or without a null."""
        if self.expected is None:
            return None
        found = np.array([each.intersection for each in self.per_tensor])
        return lift_interval(found, np.array([each.expected for each in self.per_tensor]))

    def rows(self) -> list[dict[str, object]]:
        """One row a tensor, for tables and reports."""
        return [
            {
                "tensor": each.name,
                "kind": each.kind,
                "layer": "" if each.layer is None else each.layer,
                "entries": f"{each.numel:,}",
                "a": f"{each.count_a:,}",
                "b": f"{each.count_b:,}",
                "both": f"{each.intersection:,}",
                "expected": "" if each.expected is None else f"{each.expected:,.1f}",
                "lift": "" if each.lift is None else f"{each.lift:.4g}",
                "Jaccard": "" if each.jaccard is None else percent(each.jaccard),
            }
            for each in self.per_tensor
        ]

    def table(self) -> str:
        """The rows as text, under lines that say what was compared."""
        numbers = ["layer", "entries", "a", "b", "both", "expected", "lift", "Jaccard"]
        head = facts(repr(self), [("a", self.a), ("b", self.b)])
        return f"{head}\n\n{table(self.rows(), right=numbers)}"

    def to_dict(self) -> dict[str, object]:
        """Plain JSON types, for reports and baselines."""
        interval = self.interval
        odds = self.odds_ratio
        return {
            "finding": "mask_overlap",
            "null": self.null,
            "a": self.a,
            "b": self.b,
            "dtype": self.dtype,
            "tensors": len(self.per_tensor),
            "tensors_total": self.tensors_total,
            "numel": self.numel,
            "count_a": self.count_a,
            "count_b": self.count_b,
            "intersection": self.intersection,
            "one_sided_a": self.one_sided_a,
            "one_sided_b": self.one_sided_b,
            "jaccard": self.jaccard,
            "dice": self.dice,
            "expected": self.expected,
            "variance": self.variance,
            "z": self.z,
            "lift": self.lift,
            "kappa": self.kappa,
            "odds_ratio": None if odds is None else finite_or_none(odds),
            "lifts": dict(self.lifts),
            "pooled_expected": self.pooled_expected,
            "interval": None if interval is None else [interval.low, interval.high],
            "interval_method": None if interval is None else interval.method,
            "strata": self.strata,
            "degenerate": self.degenerate,
            "saturated": self.saturated,
            "identical": self.identical,
            "nonfinite": self.nonfinite,
        }

    def __repr__(self) -> str:
        """One line that reads well in a failed `assert`."""
        lift = (
            "" if self.null is None else f"lift={_short(self.lift)}, kappa={_short(self.kappa)}, "
        )
        return (
            f"MaskOverlap({lift}jaccard={self.jaccard:.4g}, one_sided={self.one_sided_a:.4g}/"
            f"{self.one_sided_b:.4g}, {self.intersection:,} in both, null={self.null!r}"
            f"{', saturated' if self.saturated else ''})"
        )


def _z(found: int, expected: float | None, variance: float | None) -> float | None:
    return (found - expected) / math.sqrt(variance) if expected is not None and variance else None


def _short(value: float | None) -> str:
    return "None" if value is None else f"{value:.4g}"
