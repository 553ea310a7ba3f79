"""What `consensus_jaccard` found."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from pytest_subnet.tables import table
from pytest_subnet.text import column, facts, percent, short_dtype

if TYPE_CHECKING:
    from collections.abc import Mapping


class TensorConsensus(NamedTuple):
    """What the masks share in one tensor.

    Attributes:
        name: its name in the base.
        shape: of the tensor.
        dtype: of its weights; `"bool"` where no mask knows.
        layer: the number of its block; None outside the blocks.
        kind: what it is for.
        numel: its entries.
        counts: those in each mask.
        intersection: those in all masks.
        union: those in any.
        expected: what the null expects of `intersection`; None without a null.
        variance: of that.
        expected_union: what the null expects of `union`.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    layer: int | None
    kind: str
    numel: int
    counts: tuple[int, ...]
    intersection: int
    union: int
    expected: float | None
    variance: float | None
    expected_union: float | None

    @property
    def jaccard(self) -> float | None:
        """Entries in all masks over entries in any; None where there are none."""
        return self.intersection / self.union if self.union else None

    @property
    def lift(self) -> float | None:
        """`intersection` over what the null expects; None where it expects none."""
        return self.intersection / self.expected if self.expected else None


@dataclass(frozen=True, slots=True, repr=False)
class ConsensusJaccard:
    """What several masks share.

    Attributes:
        null: `"exponent"` or `"matrix"`; None for the bare number.
        masks: what each was made from, in words.
        numel: entries of all tensors.
        intersection: those in all masks.
        union: those in any.
        expected: what the null expects of `intersection`; None without a null.
        variance: of that.
        expected_union: what the null expects of `union`.
        pairwise: the Jaccard index of each two of the masks: first and second, first and third, ….
        per_tensor: the same tensor by tensor.
        fingerprints: of the base of each mask (`base_1`, …) and of its tuned checkpoint, empty
            where a mask does not know; each is taken when it is asked for.
    """

    null: str | None
    masks: tuple[str, ...]
    numel: int
    intersection: int
    union: int
    expected: float | None
    variance: float | None
    expected_union: float | None
    pairwise: tuple[float, ...]
    per_tensor: tuple[TensorConsensus, ...]
    fingerprints: Mapping[str, str] = field(default_factory=dict, compare=False, repr=False)

    @property
    def jaccard(self) -> float:
        """Entries in all masks over entries in any."""
        return self.intersection / self.union

    @property
    def jaccard_by_chance(self) -> float | None:
        """What the null expects of the one over what it expects of the other."""
        if self.expected is None or self.expected_union is None:
            return None
        return self.expected / self.expected_union

    @property
    def mean_pairwise(self) -> float:
        """Mean of `pairwise`: the consensus of arXiv 2511.08567."""
        return math.fsum(self.pairwise) / len(self.pairwise)

    @property
    def lift(self) -> float | None:
        """`intersection` over what the null expects; None where it expects none."""
        return self.intersection / self.expected if self.expected else None

    @property
    def z(self) -> float | None:
        """Standard deviations above the null; None where nothing is left to chance."""
        if self.expected is None or not self.variance:
            return None
        return (self.intersection - self.expected) / math.sqrt(self.variance)

    @property
    def dtype(self) -> str:
        """Dtypes of the weights, joined by `+`."""
        return "+".join(sorted({short_dtype(each.dtype) for each in self.per_tensor}))

    def rows(self) -> list[dict[str, object]]:
        """One row a tensor."""
        return [
            {
                "tensor": each.name,
                "kind": each.kind,
                "layer": "" if each.layer is None else each.layer,
                "entries": f"{each.numel:,}",
                "in all": f"{each.intersection:,}",
                "in any": f"{each.union:,}",
                "expected": "" if each.expected is None else f"{each.expected:,.1f}",
                "lift": "" if each.lift is None else f"{each.lift:.4g}",
                "Jaccard": "" if each.jaccard is None else percent(each.jaccard),
            }
            for each in self.per_tensor
        ]

    def table(self) -> str:
        """The rows as text, under lines that say what was compared."""
        lines = column("masks", self.masks)
        numbers = ["layer", "entries", "in all", "in any", "expected", "lift", "Jaccard"]
        return f"{facts(repr(self), lines)}\n\n{table(self.rows(), right=numbers)}"

    def to_dict(self) -> dict[str, object]:
        """Plain JSON types, for reports and baselines."""
        return {
            "finding": "consensus_jaccard",
            "null": self.null,
            "masks": list(self.masks),
            "jaccard": self.jaccard,
            "jaccard_by_chance": self.jaccard_by_chance,
            "mean_pairwise": self.mean_pairwise,
            "intersection": self.intersection,
            "union": self.union,
            "expected": self.expected,
            "variance": self.variance,
            "z": self.z,
            "lift": self.lift,
            "dtype": self.dtype,
            "tensors": len(self.per_tensor),
            "numel": self.numel,
        }

    def __repr__(self) -> str:
        """One line that reads well in a failed `assert`."""
        chance = self.jaccard_by_chance
        beside = "" if chance is None else f" (by chance {percent(chance)})"
        lift = "" if self.lift is None else f", lift={self.lift:.4g}"
        return (
            f"ConsensusJaccard(jaccard={percent(self.jaccard)}{beside}{lift}, "
            f"{len(self.masks)} masks, null={self.null!r})"
        )
