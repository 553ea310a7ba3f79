"""What `task_vector_cosine` found."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from pytest_subnet.tables import table
from pytest_subnet.text import column, facts, plural, short_dtype

if TYPE_CHECKING:
    from collections.abc import Mapping


class Products(NamedTuple):
    """Sums over the entries of two task vectors a and b.

    Attributes:
        numel: how many entries.
        dot: Σ a b.
        squares_a: Σ a².
        squares_b: Σ b².
        squares_both: Σ a² b².
    """

    numel: int
    dot: float
    squares_a: float
    squares_b: float
    squares_both: float

    @property
    def cosine(self) -> float | None:
        """Σ a b / √(Σ a² Σ b²); None where one of them did not move."""
        norms = math.sqrt(self.squares_a) * math.sqrt(self.squares_b)
        return max(-1.0, min(1.0, self.dot / norms)) if norms else None

    @property
    def sd_even(self) -> float:
        """Standard deviation of the cosine of two random directions: 1 / √entries."""
        return 1 / math.sqrt(self.numel)

    @property
    def sd(self) -> float | None:
        """That of the cosine if the signs of one vector were drawn: √(Σ a² b²) / √(Σ a² Σ b²).

        The same as `sd_even` for entries of even size, and larger where few entries carry both, as
        after rounding to 16 bits. None where one of them did not move.
        """
        norms = math.sqrt(self.squares_a) * math.sqrt(self.squares_b)
        return math.sqrt(self.squares_both) / norms if norms else None

    @property
    def z(self) -> float | None:
        """The cosine over `sd`; None where no entry moved in both."""
        return self.cosine / self.sd if self.cosine is not None and self.sd else None


class TensorCosine(NamedTuple):
    """How far two updates of one tensor point the same way.

    Attributes:
        name: its name in the base.
        shape: what was compared.
        dtype: in which dtype, on the side of `a`.
        layer: the number of its block; None outside the blocks.
        kind: what it is for.
        products: what was added up.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    layer: int | None
    kind: str
    products: Products

    @property
    def numel(self) -> int:
        """Its entries."""
        return self.products.numel

    @property
    def cosine(self) -> float | None:
        """As `Products.cosine`."""
        return self.products.cosine

    @property
    def z(self) -> float | None:
        """As `Products.z`."""
        return self.products.z


@dataclass(frozen=True, slots=True, repr=False)
class TaskVectorCosine:
    """How far two runs moved the same way.

    Attributes:
        a: `base -> tuned` of one run.
        b: that of the other.
        products: what was added up over all tensors.
        per_tensor: the same tensor by tensor.
        notes: what a reader of the numbers must know.
        fingerprints: of the base and both tuned checkpoints, taken when they are asked for.
    """

    a: str
    b: str
    products: Products
    per_tensor: tuple[TensorCosine, ...]
    notes: tuple[str, ...]
    fingerprints: Mapping[str, str] = field(default_factory=dict, compare=False, repr=False)

    @property
    def cosine(self) -> float:
        """Σ a b / √(Σ a² Σ b²) over all entries, not the mean over tensors."""
        return self.products.cosine or 0.0

    @property
    def z(self) -> float | None:
        """Standard deviations from 0, as `Products.sd` has them."""
        return self.products.z

    @property
    def sd(self) -> float:
        """As `Products.sd`."""
        return self.products.sd or 0.0

    @property
    def sd_even(self) -> float:
        """As `Products.sd_even`."""
        return self.products.sd_even

    @property
    def numel(self) -> int:
        """Entries of all tensors."""
        return self.products.numel

    @property
    def dtype(self) -> str:
        """Their dtypes, joined by `+`."""
        return "+".join(sorted({short_dtype(each.dtype) for each in self.per_tensor}))

    def rows(self) -> list[dict[str, object]]:
        """One row a tensor."""
        return [
            {
                "tensor": each.name,
                "kind": each.kind,
                "layer": "" if each.layer is None else each.layer,
                "entries": f"{each.numel:,}",
                "cosine": "" if each.cosine is None else f"{each.cosine:.4f}",
                "sd": "" if each.products.sd is None else f"{each.products.sd:.2g}",
                "z": "" if each.z is None else f"{each.z:.3g}",
            }
            for each in self.per_tensor
        ]

    def table(self) -> str:
        """The rows as text, under lines that say what was compared."""
        lines = [("a", self.a), ("b", self.b)]
        lines += column("note", self.notes)
        numbers = ["layer", "entries", "cosine", "sd", "z"]
        return f"{facts(repr(self), lines)}\n\n{table(self.rows(), right=numbers)}"

    def to_dict(self) -> dict[str, object]:
        """Plain JSON types, for reports and baselines."""
        return {
            "finding": "task_vector_cosine",
            "cosine": self.cosine,
            "sd": self.sd,
            "sd_even": self.sd_even,
            "z": self.z,
            "a": self.a,
            "b": self.b,
            "dtype": self.dtype,
            "tensors": len(self.per_tensor),
            "numel": self.numel,
            "notes": list(self.notes),
        }

    def __repr__(self) -> str:
        """One line that reads well in a failed `assert`."""
        z = "None" if self.z is None else f"{self.z:.3g}"
        return (
            f"TaskVectorCosine(cosine={self.cosine:.4f} (by chance 0 ± {self.sd:.2g}), z={z}, "
            f"{plural(len(self.per_tensor), 'tensor')}, {self.dtype})"
        )
