"""What `singular_shift` found."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeAlias

from pytest_subnet.findings.matrices.result import OfMatrices
from pytest_subnet.tables import table
from pytest_subnet.text import column, facts, plural, spell_tensor

if TYPE_CHECKING:
    from collections.abc import Mapping

RelativeTo: TypeAlias = Literal["spectrum", "top", "each"]

_RELATIVE = {
    "spectrum": "the spectrum",
    "top": "the largest value",
    "each": "each value",
}


class SingularShift(NamedTuple):
    """How far the singular values of one matrix moved.

    Attributes:
        name: its name in the base; `experts[3]` in a stack.
        shape: `(m, n)`.
        dtype: in which it was compared.
        layer: the number of its block; None outside the blocks.
        kind: what it is for.
        shift: relative to what was asked; an upper bound where `is_bound`.
        moved_most: which singular value moved most, from 0 on; None where they were not computed.
        relative_change: Frobenius norm of the update over that of the base; None in a stack.
        method: what proved it: `"certificate:mirsky"`, the norms alone, or `"gram"`, all values.
    """

    name: str
    shape: tuple[int, int]
    dtype: str
    layer: int | None
    kind: str
    shift: float
    moved_most: int | None
    relative_change: float | None
    method: str

    @property
    def numel(self) -> int:
        """Its entries."""
        return self.shape[0] * self.shape[1]

    @property
    def is_bound(self) -> bool:
        """Whether the true shift may be smaller."""
        return self.method != "gram" and self.shift > 0


@dataclass(frozen=True, slots=True, repr=False)
class SingularShifts(OfMatrices):
    """How far singular values moved.

    Attributes:
        pair: `base -> tuned`.
        relative_to: `"spectrum"`, `"top"` or `"each"`.
        matrices_total: how many matrices the pair has.
        notes: what a reader of the numbers must know.
        per_tensor: the matrices measured.
        fingerprints: of base and tuned, taken when they are asked for.
    """

    pair: str
    relative_to: RelativeTo
    matrices_total: int
    notes: tuple[str, ...]
    per_tensor: tuple[SingularShift, ...]
    fingerprints: Mapping[str, str] = field(default_factory=dict, compare=False, repr=False)

    @property
    def shift(self) -> float:
        """The largest of all matrices."""
        return max(each.shift for each in self.per_tensor)

    @property
    def mean_shift(self) -> float:
        """The mean over the matrices, each counting once."""
        return math.fsum(each.shift for each in self.per_tensor) / len(self.per_tensor)

    @property
    def proven_by_norms(self) -> int:
        """How many matrices were not decomposed."""
        return sum(each.method != "gram" for each in self.per_tensor)

    @property
    def nothing_moved(self) -> bool:
        """Whether no singular value of any matrix moved."""
        return all(each.shift == 0 for each in self.per_tensor)

    def coverage(self) -> list[tuple[str, str]]:
        """The lines of a message that say what was measured."""
        matrices = f"{len(self.per_tensor):,}/{plural(self.matrices_total, 'matrix')}"
        lines = [
            ("pair", f"{self.pair}   ({self.dtype}, {matrices}, {plural(self.numel, 'entry')})"),
            ("relative", f"to {_RELATIVE[self.relative_to]} of the base"),
            (
                "proven",
                f"{self.proven_by_norms:,} by norms alone, "
                f"{len(self.per_tensor) - self.proven_by_norms:,} by all singular values",
            ),
        ]
        return lines + column("note", self.notes)

    def rows(self) -> list[dict[str, object]]:
        """One row a matrix."""
        return [
            {
                "tensor": each.name,
                "kind": each.kind,
                "layer": "" if each.layer is None else each.layer,
                "shape": spell_tensor(each.dtype, each.shape),
                "shift": f"{'<= ' if each.is_bound else ''}{each.shift:.3g}",
                "most": "" if each.moved_most is None else f"σ{each.moved_most + 1}",
                "update": "" if each.relative_change is None else f"{each.relative_change:.3g}",
                "by": each.method,
            }
            for each in self.per_tensor
        ]

    def table(self) -> str:
        """The rows as text, under a line that says what was measured."""
        numbers = ["layer", "shift", "most", "update"]
        return f"{facts(repr(self), self.coverage())}\n\n{table(self.rows(), right=numbers)}"

    def to_dict(self) -> dict[str, object]:
        """Plain JSON types, for reports and baselines."""
        return {
            "finding": "singular_shift",
            "shift": self.shift,
            "mean_shift": self.mean_shift,
            "relative_to": self.relative_to,
            "proven_by_norms": self.proven_by_norms,
            "pair": self.pair,
            "dtype": self.dtype,
            "tensors": len(self.per_tensor),
            "tensors_total": self.matrices_total,
            "numel": self.numel,
            "notes": list(self.notes),
        }

    def __repr__(self) -> str:
        """One line that reads well in a failed `assert`."""
        return (
            f"SingularShifts(shift={self.shift:.4g} at most, mean={self.mean_shift:.4g}, "
            f"{plural(len(self.per_tensor), 'matrix')}, relative to "
            f"{_RELATIVE[self.relative_to]}, {self.dtype})"
        )
