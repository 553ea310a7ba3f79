"""What `displacement_rank` found."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from pytest_subnet.findings.matrices.result import OfMatrices
from pytest_subnet.tables import table
from pytest_subnet.text import column, facts, plural

if TYPE_CHECKING:
    from collections.abc import Mapping


class DisplacementRank(NamedTuple):
    """How structured one matrix is.

    Attributes:
        name: its name in the base.
        shape: `(m, n)`.
        dtype: in which it is stored, or compared.
        layer: the number of its block; None outside the blocks.
        kind: what it is for.
        rank: of its displacement: singular values above `tolerance`.
        tolerance: the largest singular value that rounding to `dtype` is expected to produce.
        leading: the largest singular values of the displacement, as far as they were computed.
        method: `"sketch"`, with what is left beyond it bounded, or `"gram"`, all of them counted.
        nullity: of how many dimensions are the matrices that the operator turns to zeros.
    """

    name: str
    shape: tuple[int, int]
    dtype: str
    layer: int | None
    kind: str
    rank: int
    tolerance: float
    leading: tuple[float, ...]
    method: str
    nullity: int

    @property
    def numel(self) -> int:
        """Its entries."""
        return self.shape[0] * self.shape[1]

    @property
    def max_rank(self) -> int:
        """The rank without any structure: min(m, n)."""
        return min(self.shape)

    @property
    def operator_invertible(self) -> bool:
        """Whether the displacement determines the matrix."""
        return self.nullity == 0

    @property
    def compression(self) -> float | None:
        """Entries for each number of its generators, mn / (r (m + n)); None of rank 0."""
        return self.numel / (self.rank * sum(self.shape)) if self.rank else None


@dataclass(frozen=True, slots=True, repr=False)
class DisplacementRanks(OfMatrices):
    """How structured matrices are.

    Attributes:
        pair: `base -> tuned`, or the dtype and shape of the one matrix.
        of: `"base"`, `"tuned"`, `"update"` or, of a matrix by itself, `"matrix"`.
        operator: its name.
        form: `"sylvester"` or `"stein"`.
        matrices_total: how many the pair has.
        notes: what a reader of the numbers must know.
        per_tensor: the matrices measured.
        fingerprints: of base and tuned, taken when they are asked for; of one matrix none.
    """

    pair: str
    of: str
    operator: str
    form: str
    matrices_total: int
    notes: tuple[str, ...]
    per_tensor: tuple[DisplacementRank, ...]
    fingerprints: Mapping[str, str] = field(default_factory=dict, compare=False, repr=False)

    @property
    def rank(self) -> int:
        """The highest of all matrices."""
        return max(each.rank for each in self.per_tensor)

    @property
    def operator_invertible(self) -> bool:
        """Whether every displacement determines its matrix."""
        return all(each.operator_invertible for each in self.per_tensor)

    @property
    def compression(self) -> float | None:
        """Entries for each number of the generators, of all together; None where one has rank 0."""
        if any(each.rank == 0 for each in self.per_tensor):
            return None
        return self.numel / sum(each.rank * sum(each.shape) for each in self.per_tensor)

    def coverage(self) -> list[tuple[str, str]]:
        """The lines of a message that say what was measured."""
        matrices = f"{len(self.per_tensor):,}/{plural(self.matrices_total, 'matrix')}"
        what = f"{self.operator}, {self.form}, of {self.of}, {self.dtype}, {matrices}"
        lines = [("pair", f"{self.pair}   ({what})")]
        return lines + column("note", self.notes)

    def rows(self) -> list[dict[str, object]]:
        """One row a matrix."""
        return [
            {
                "tensor": each.name,
                "kind": each.kind,
                "layer": "" if each.layer is None else each.layer,
                "shape": f"{each.shape[0]}x{each.shape[1]}",
                "rank": f"{each.rank:,} of {each.max_rank:,}",
                "compression": "" if each.compression is None else f"{each.compression:.3g}",
                "tolerance": f"{each.tolerance:.3g}",
                "nullity": f"{each.nullity:,}",
                "by": each.method,
            }
            for each in self.per_tensor
        ]

    def table(self) -> str:
        """The rows as text, under a line that says what was measured."""
        numbers = ["layer", "shape", "rank", "compression", "tolerance", "nullity"]
        return f"{facts(repr(self), self.coverage())}\n\n{table(self.rows(), right=numbers)}"

    def to_dict(self) -> dict[str, object]:
        """Plain JSON types, for reports and baselines."""
        return {
            "finding": "displacement_rank",
            "rank": self.rank,
            "compression": self.compression,
            "operator_invertible": self.operator_invertible,
            "operator": self.operator,
            "form": self.form,
            "of": self.of,
            "pair": self.pair,
            "dtype": self.dtype,
            "tensors": len(self.per_tensor),
            "tensors_total": self.matrices_total,
            "numel": self.numel,
            "notes": list(self.notes),
        }

    def __repr__(self) -> str:
        """One line that reads well in a failed `assert`."""
        of = f", of the {self.of}" if self.of in ("base", "update") else ""
        return (
            f"DisplacementRanks(rank={self.rank} at most{of}, "
            f"{plural(len(self.per_tensor), 'matrix')}, {self.operator}, {self.dtype})"
        )
