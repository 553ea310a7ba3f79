"""What ranking the updates gives: a row for each matrix, and the paper's mean over them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeAlias

from pytest_subnet.findings.matrices.result import OfMatrices
from pytest_subnet.tables import table
from pytest_subnet.text import column, facts, percent, plural, spell_tensor

if TYPE_CHECKING:
    from collections.abc import Mapping

Null: TypeAlias = Literal["rounding"] | None
"""What the number is held against: what rounding to the storage dtype does alone, or nothing."""


class RankOfUpdate(NamedTuple):
    """The rank of one matrix's update.

    Attributes:
        name: its name in the base; `experts[3]` for one matrix of a stack.
        shape: `(m, n)`.
        dtype: in which dtype base and tuned were compared.
        layer: the number of its block; None outside the blocks.
        kind: what it is for.
        rank: singular values of tuned - base above σ1 · max(m, n) · eps(float32).
        max_rank: min(m, n).
        stable_rank: ||tuned - base||_F² / σ1²; 0 where nothing moved.
        resolved_rank: singular values above twice the rounding floor; None where nothing is
            rounded, or it was not asked for.
        effective_rank: exp of the entropy of σ / Σσ; None where it was not asked for.
        largest: σ1, in weight units.
        floor: the largest singular value to expect of rounding noise, of variance gap² / 12 with
            the gap between neighbouring values at each entry: the root of the largest sum over a
            row and that of the largest over a column, added; None where nothing is rounded.
        is_bfloat16: whether the tuned side is float32 of which every value is one of bfloat16.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    layer: int | None
    kind: str
    rank: int
    max_rank: int
    stable_rank: float
    resolved_rank: int | None
    effective_rank: float | None
    largest: float
    floor: float | None
    is_bfloat16: bool

    @property
    def numel(self) -> int:
        """Its entries."""
        return math.prod(self.shape)

    @property
    def ratio(self) -> float:
        """Rank / min(m, n)."""
        return self.rank / self.max_rank

    @property
    def resolved_ratio(self) -> float | None:
        """resolved_rank / min(m, n)."""
        return None if self.resolved_rank is None else self.resolved_rank / self.max_rank

    @property
    def ratio_beyond_rounding(self) -> float:
        """resolved_rank / min(m, n), or rank / min(m, n) where nothing is rounded."""
        return self.ratio if self.resolved_ratio is None else self.resolved_ratio

    @property
    def explained_by_rounding(self) -> bool:
        """Whether most of the rank is below what rounding noise reaches."""
        return self.resolved_rank is not None and 2 * self.resolved_rank < self.rank


@dataclass(frozen=True, slots=True, repr=False)
class UpdateRank(OfMatrices):
    """The rank of each matrix's update.

    Attributes:
        pair: `base -> tuned`.
        matrices_total: how many matrices the pair has, those of stacks included.
        notes: casts, rows left out, ties, tensors that are no matrices.
        null: `"rounding"` where the resolved ranks were counted.
        per_tensor: the matrices measured, as `RankOfUpdate`.
        fingerprints: of the content of base and tuned; each is taken when it is asked for.
    """

    pair: str
    matrices_total: int
    notes: tuple[str, ...]
    null: Null
    per_tensor: tuple[RankOfUpdate, ...]
    fingerprints: Mapping[str, str] = field(default_factory=dict, compare=False, repr=False)

    @property
    def rank(self) -> int:
        """Of all matrices together."""
        return sum(each.rank for each in self.per_tensor)

    @property
    def max_rank(self) -> int:
        """Of all matrices together."""
        return sum(each.max_rank for each in self.per_tensor)

    @property
    def ratio(self) -> float:
        """Mean of rank / min(m, n) over the matrices, each counting once: the paper's number."""
        return math.fsum(each.ratio for each in self.per_tensor) / len(self.per_tensor)

    @property
    def stable_rank(self) -> float:
        """Mean over the matrices."""
        return math.fsum(each.stable_rank for each in self.per_tensor) / len(self.per_tensor)

    @property
    def resolved_rank(self) -> int | None:
        """Of all matrices together, those that are not rounded by their rank; None without any."""
        if all(each.resolved_rank is None for each in self.per_tensor):
            return None
        return sum(
            each.rank if each.resolved_rank is None else each.resolved_rank
            for each in self.per_tensor
        )

    @property
    def resolved_ratio(self) -> float | None:
        """Mean of resolved rank / min(m, n); None where nothing is rounded or it is not known."""
        if self.resolved_rank is None:
            return None
        shares = (each.ratio_beyond_rounding for each in self.per_tensor)
        return math.fsum(shares) / len(self.per_tensor)

    @property
    def explained_by_rounding(self) -> bool:
        """Whether most of the number is below what rounding noise reaches.

        False where nothing is rounded, and where the null was not asked for.
        """
        resolved = self.resolved_ratio
        return resolved is not None and 2 * resolved < self.ratio

    @property
    def nothing_moved(self) -> bool:
        """Whether no matrix changed."""
        return all(each.rank == 0 for each in self.per_tensor)

    def coverage(self) -> list[tuple[str, str]]:
        """The lines of a message that say what was measured."""
        matrices = f"{len(self.per_tensor):,}/{plural(self.matrices_total, 'matrix')}"
        rows = [
            ("pair", f"{self.pair}   ({self.dtype}, {matrices}, {plural(self.numel, 'entry')})"),
            ("tolerance", "singular values above σ1 · max(m, n) · 2^-23"),
        ]
        return rows + column("note", self.notes)

    def rows(self) -> list[dict[str, object]]:
        """One row a matrix, for tables and reports."""
        return [
            {
                "tensor": each.name,
                "kind": each.kind,
                "layer": "" if each.layer is None else each.layer,
                "shape": spell_tensor(each.dtype, each.shape),
                "rank": f"{each.rank:,}",
                "of": f"{each.max_rank:,}",
                "share": percent(each.ratio),
                "stable": f"{each.stable_rank:.1f}",
                "resolved": "" if each.resolved_rank is None else f"{each.resolved_rank:,}",
                "effective": "" if each.effective_rank is None else f"{each.effective_rank:.1f}",
            }
            for each in self.per_tensor
        ]

    def table(self) -> str:
        """The rows as text, under a line that says what was measured."""
        numbers = ["layer", "rank", "of", "share", "stable", "resolved", "effective"]
        return f"{facts(repr(self), self.coverage())}\n\n{table(self.rows(), right=numbers)}"

    def to_dict(self) -> dict[str, object]:
        """Plain JSON types, for reports and baselines."""
        return {
            "finding": "update_rank",
            "ratio": self.ratio,
            "rank": self.rank,
            "max_rank": self.max_rank,
            "stable_rank": self.stable_rank,
            "resolved_rank": self.resolved_rank,
            "resolved_ratio": self.resolved_ratio,
            "explained_by_rounding": self.explained_by_rounding,
            "null": self.null,
            "pair": self.pair,
            "dtype": self.dtype,
            "tensors": len(self.per_tensor),
            "tensors_total": self.matrices_total,
            "numel": self.numel,
            "notes": list(self.notes),
        }

    def __repr__(self) -> str:
        """One line that reads well in a failed `assert`."""
        resolved = self.resolved_ratio
        beyond = "" if resolved is None else f", resolved_ratio={resolved:.4g}"
        return (
            f"UpdateRank(ratio={self.ratio:.4g}{beyond}, stable_rank={self.stable_rank:.4g}, "
            f"{plural(len(self.per_tensor), 'matrix')}, {self.dtype})"
        )
