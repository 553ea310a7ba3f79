"""What `restore_singular_vectors` wrote."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeAlias

from pytest_subnet.tables import table
from pytest_subnet.text import percent, plural, safe, spell_tensor

if TYPE_CHECKING:
    from pathlib import Path

Values: TypeAlias = Literal["tuned", "base"]


class RestoredMatrix(NamedTuple):
    """One matrix that was written anew. Changes are Frobenius norms of what is stored.

    Attributes:
        name: its name in the base.
        shape: `(m, n)`.
        dtype: in which it was written, that of the tuned checkpoint.
        layer: the number of its block; None outside the blocks.
        kind: what it is for.
        tuned_to_base: ‖tuned - base‖ / ‖base‖, before the edit.
        to_base: ‖written - base‖ / ‖base‖.
        to_tuned: ‖written - tuned‖ / ‖tuned‖.
    """

    name: str
    shape: tuple[int, int]
    dtype: str
    layer: int | None
    kind: str
    tuned_to_base: float
    to_base: float
    to_tuned: float

    @property
    def numel(self) -> int:
        """Its entries."""
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True, repr=False)
class RestoredVectors:
    """A checkpoint in which leading or trailing singular directions are the base's again.

    Attributes:
        output: the directory that was written.
        pair: `base -> tuned`.
        k_top: how many of the leading directions of each matrix.
        k_tail: how many of the trailing ones.
        values: whose singular values go with them.
        per_tensor: the matrices selected; a fused one is one here, and was edited part by part.
        notes: what a reader of the numbers must know.
    """

    output: Path
    pair: str
    k_top: int
    k_tail: int
    values: Values
    per_tensor: tuple[RestoredMatrix, ...]
    notes: tuple[str, ...]

    def rows(self) -> list[dict[str, object]]:
        """One row a matrix."""
        return [
            {
                "matrix": each.name,
                "stored": spell_tensor(each.dtype, each.shape),
                "tuned to base": percent(each.tuned_to_base),
                "written to base": percent(each.to_base),
                "written to tuned": percent(each.to_tuned),
            }
            for each in self.per_tensor
        ]

    def table(self) -> str:
        """The rows as text, under what was written."""
        numbers = ["tuned to base", "written to base", "written to tuned"]
        return f"{self!r}\n\n{table(self.rows(), right=numbers)}"

    def to_dict(self) -> dict[str, object]:
        """Plain JSON types."""
        return {
            "output": str(self.output),
            "k_top": self.k_top,
            "k_tail": self.k_tail,
            "values": self.values,
            "matrices": [
                {
                    "name": each.name,
                    "tuned_to_base": each.tuned_to_base,
                    "to_base": each.to_base,
                    "to_tuned": each.to_tuned,
                }
                for each in self.per_tensor
            ],
        }

    def __repr__(self) -> str:
        """One line: what was restored, of how many matrices, and where it is."""
        return (
            f"RestoredVectors(k_top={self.k_top}, k_tail={self.k_tail}, values of the "
            f"{self.values}, {plural(len(self.per_tensor), 'matrix')}, in {safe(self.output)})"
        )
