"""What all results have in common: which pair, how much of it, under which tolerance."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from pytest_subnet.scan.gathering import gather
from pytest_subnet.scan.tolerance import Tolerance
from pytest_subnet.text import plural, safe, short_dtype, spell_tensor

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pytest_subnet.pairs import ModelPair, Selection, TensorPair

Message: TypeAlias = Callable[[str], str]
"""Rewords a failure: takes the default text, gives the text to raise."""

WORST = 3
"""How many of the worst tensors a failure shows."""


@dataclass(frozen=True, slots=True)
class Coverage:
    """What a number was measured on.

    Attributes:
        pair: `base -> tuned`.
        tolerance: under which an entry counts as updated.
        dtype: of the entries compared; several are joined by `+`.
        tensors: how many tensors were measured.
        tensors_total: how many there are in the pair, buffers and integer tensors apart.
        numel: entries measured.
        notes: casts, rows left out, ties.
    """

    pair: str
    tolerance: Tolerance
    dtype: str
    tensors: int
    tensors_total: int
    numel: int
    notes: tuple[str, ...]

    def rows(self) -> list[tuple[str, str]]:
        """The lines of a message that say what was measured."""
        measured = (
            f"{self.tolerance}, {self.dtype}, {self.tensors:,}/{self.tensors_total:,} tensors, "
            f"{plural(self.numel, 'entry')}"
        )
        lines = [("pair", f"{self.pair}   ({measured})")]
        return lines + [("note" if i == 0 else "", note) for i, note in enumerate(self.notes)]

    def to_dict(self) -> dict[str, object]:
        """Plain JSON types."""
        return {
            "pair": self.pair,
            "tolerance": str(self.tolerance),
            "dtype": self.dtype,
            "tensors": self.tensors,
            "tensors_total": self.tensors_total,
            "numel": self.numel,
            "notes": list(self.notes),
        }


def cover(pair: ModelPair, selection: Selection, tolerance: Tolerance) -> Coverage:
    """Say what `selection` of `pair` covers."""
    chosen = [pair.tensors[row] for row in selection.rows]
    ties = [f"{safe(name)} is tied, counted once" for name in pair.tied]
    return Coverage(
        pair=pair.label,
        tolerance=tolerance,
        dtype="+".join(sorted({short_dtype(tensor.dtype) for tensor in chosen})),
        tensors=len(chosen),
        tensors_total=sum(tensor.is_weight for tensor in pair.tensors),
        numel=sum(tensor.numel for tensor in chosen),
        notes=(*pair.notes, *ties),
    )


@dataclass(frozen=True, slots=True)
class Movement:
    """How one tensor moved.

    Attributes:
        name: its name in the base.
        shape: what was compared.
        dtype: in which dtype.
        layer: the number of its block; None outside the blocks.
        kind: what it is for.
        numel: its entries.
        updated: entries updated under the result's tolerance.
        zero_sign_flips: entries that are zero on both sides, with another sign.
        nonfinite_base: NaN and Inf in the base.
        nonfinite_tuned: NaN and Inf in the tuned checkpoint.
        max_change: the largest |tuned - base| between finite entries, in weight units.
        change_norm: Frobenius norm of tuned - base over finite entries.
        base_norm: Frobenius norm of the base over finite entries.
        tuned_norm: Frobenius norm of the tuned tensor over finite entries.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    layer: int | None
    kind: str
    numel: int
    updated: int
    zero_sign_flips: int
    nonfinite_base: int
    nonfinite_tuned: int
    max_change: float
    change_norm: float
    base_norm: float
    tuned_norm: float

    @property
    def sparsity(self) -> float:
        """Share of entries not updated."""
        return 1 - self.updated / self.numel

    @property
    def density(self) -> float:
        """Share of entries updated."""
        return self.updated / self.numel

    @property
    def relative_change(self) -> float:
        """Norm of the change over the norm of the base; Inf where only the base is zero."""
        if self.base_norm == 0:
            return math.inf if self.change_norm else 0.0
        return self.change_norm / self.base_norm

    def spell(self) -> str:
        """Name, dtype and shape, as messages show them."""
        return f"{safe(self.name)}  {spell_tensor(self.dtype, self.shape)}"


def measure(pair: ModelPair, rows: Sequence[int], tolerance: Tolerance) -> tuple[Movement, ...]:
    """Count the tensors `rows` of `pair`, reading what has not been read yet."""
    counted = gather(pair, rows, tolerance)
    updated = counted.updated(tolerance)
    index = list(rows)
    columns = zip(
        index,
        updated[index].tolist(),
        counted.integers[index].tolist(),
        counted.sums[index].tolist(),
        counted.peaks[index].tolist(),
        strict=True,
    )
    return tuple(
        _movement(pair.tensors[row], entries, integers, sums, peak)
        for row, entries, integers, sums, peak in columns
    )


def _movement(
    tensor: TensorPair, updated: int, integers: Sequence[int], sums: Sequence[float], peak: float
) -> Movement:
    _, zero_flips, nonfinite_base, nonfinite_tuned = integers
    change, base, tuned = (math.sqrt(value) for value in sums)
    return Movement(
        tensor.name,
        tensor.shape,
        tensor.dtype,
        tensor.layer,
        tensor.kind,
        tensor.numel,
        updated,
        zero_flips,
        nonfinite_base,
        nonfinite_tuned,
        peak,
        change,
        base,
        tuned,
    )


def reworded(text: str, message: Message | None) -> str:
    """The text to raise: the default one, or what the caller makes of it."""
    return text if message is None else message(text)
