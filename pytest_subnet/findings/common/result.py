"""What all results have in common: which pair, how much of it, under which tolerance."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

import numpy as np

from pytest_subnet.checkpoints.dtypes import ARITHMETIC
from pytest_subnet.findings.common.fingerprints import of_pair
from pytest_subnet.scan.gathering import gather
from pytest_subnet.text import column, plural, safe, short_dtype

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from pytest_subnet.pairs import ModelPair
    from pytest_subnet.scan.tolerance import Tolerance

Message: TypeAlias = Callable[[str], str]
"""Rewords a failure: takes the default text, gives the text to raise."""


@dataclass(frozen=True, slots=True)
class Coverage:
    """What a number was measured on.

    Attributes:
        pair: `base -> tuned`.
        tolerance: under which an entry counts as updated.
        dtype: of the entries compared; several are joined by `+`.
        tensors: how many tensors were measured.
        tensors_total: how many of the pair could have been.
        numel: entries measured.
        notes: casts, rows left out, ties, tensors that do not align.
        fingerprints: of the checkpoints, `base` and `tuned` or what they are called in the
            finding; each is taken when it is asked for.
    """

    pair: str
    tolerance: Tolerance
    dtype: str
    tensors: int
    tensors_total: int
    numel: int
    notes: tuple[str, ...]
    fingerprints: Mapping[str, str] = field(default_factory=dict, compare=False, repr=False)

    def rows(self) -> list[tuple[str, str]]:
        """The lines of a message that say what was measured."""
        tensors = f"{self.tensors:,}/{plural(self.tensors_total, 'tensor')}"
        measured = f"{self.tolerance}, {self.dtype}, {tensors}, {plural(self.numel, 'entry')}"
        lines = [("pair", f"{self.pair}   ({measured})")]
        return lines + column("note", self.notes)

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


def cover(
    pair: ModelPair, tensors: Sequence[Movement], tolerance: Tolerance, *, total: int
) -> Coverage:
    """Say what `tensors`, of the `total` that could have been measured, cover of `pair`."""
    notes = [*pair.notes, *(f"{safe(name)} is tied, counted once" for name in pair.tied)]
    if pair.problems:  # all of them were excluded, or there would be no measure
        notes.append(f"{plural(len(pair.problems), 'tensor')} left out that cannot be compared")
    return Coverage(
        pair=pair.label,
        tolerance=tolerance,
        dtype="+".join(sorted(short_dtype(dtype) for dtype in {each.dtype for each in tensors})),
        tensors=len(tensors),
        tensors_total=total,
        numel=sum(each.numel for each in tensors),
        notes=tuple(notes),
        fingerprints=of_pair(pair),
    )


class Movement(NamedTuple):
    """How one tensor moved.

    Attributes:
        name: its name in the base.
        shape: what was compared.
        dtype: in which dtype.
        layer: the number of its block; None outside the blocks.
        kind: what it is for.
        numel: its entries.
        updated: entries updated under the result's tolerance.
        changed: entries with other bits, whatever the tolerance.
        zero_sign_flips: of these, zeros that only changed their sign.
        nonfinite_base: NaN and Inf in the base.
        nonfinite_tuned: NaN and Inf in the tuned checkpoint.
        max_change: the largest |tuned - base| between finite entries, in weight units; 0 where the
            dtype has no arithmetic here (integers, float8).
        change_norm: Frobenius norm of tuned - base over finite entries.
        base_norm: Frobenius norm of the base over finite entries.
        tuned_norm: Frobenius norm of the tuned tensor over finite entries.
        expected_sparsity: where sparsity is what was asked: an estimate of what an unstructured
            update of the same energy would show after rounding to a 16-bit dtype.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    layer: int | None
    kind: str
    numel: int
    updated: int
    changed: int
    zero_sign_flips: int
    nonfinite_base: int
    nonfinite_tuned: int
    max_change: float
    change_norm: float
    base_norm: float
    tuned_norm: float
    expected_sparsity: float | None = None

    @property
    def sparsity(self) -> float:
        """Share of entries not updated."""
        return (self.numel - self.updated) / self.numel

    @property
    def density(self) -> float:
        """Share of entries updated."""
        return self.updated / self.numel

    @property
    def relative_change(self) -> float:
        """Norm of the change over the norm of the base; Inf where that is no number."""
        change = max(self.change_norm, self.max_change)  # squares of tiny changes underflow
        if change == 0:
            return 0.0
        if self.base_norm == 0 or math.isinf(self.base_norm):
            return math.inf
        return change / self.base_norm

    @property
    def has_distance(self) -> bool:
        """Whether differences are formed in its dtype; if not, only bits are compared."""
        return self.dtype in ARITHMETIC

    @property
    def value_changes(self) -> int:
        """Updated entries, without zeros that only changed sign, without NaN and Inf.

        Where there are NaN or Inf it is a lower bound: each is taken for one of the updated.
        """
        # A tolerance never counts these zeros, same bits always does.
        updated = min(self.updated, self.changed - self.zero_sign_flips)
        return max(updated - self.nonfinite, 0)

    @property
    def value_density(self) -> float:
        """Share of entries of which that is true."""
        return self.value_changes / self.numel

    @property
    def moved(self) -> bool:
        """Whether values changed other than into NaN or Inf."""
        return self.value_changes > 0 and (self.max_change > 0 or not self.has_distance)

    @property
    def nonfinite(self) -> int:
        """NaN and Inf on both sides together."""
        return self.nonfinite_base + self.nonfinite_tuned


def measure(pair: ModelPair, rows: Sequence[int], tolerance: Tolerance) -> tuple[Movement, ...]:
    """Count the tensors `rows` of `pair`, reading what has not been read yet."""
    counted = gather(pair, rows, tolerance)
    index = list(rows)
    columns = zip(
        [pair.tensors[row] for row in index],
        counted.updated(tolerance)[index].tolist(),
        counted.integers[index].tolist(),
        counted.peaks[index].tolist(),
        np.sqrt(counted.sums[index]).tolist(),
        strict=True,
    )
    return tuple(
        Movement(
            tensor.name,
            tensor.shape,
            tensor.dtype,
            tensor.layer,
            tensor.kind,
            tensor.numel,
            updated,
            changed,
            flips,
            nonfinite_base,
            nonfinite_tuned,
            peak,
            change_norm,
            base_norm,
            tuned_norm,
        )
        for (
            tensor,
            updated,
            (changed, flips, nonfinite_base, nonfinite_tuned),
            peak,
            (change_norm, base_norm, tuned_norm),
        ) in columns
    )


def reworded(text: str, message: Message | None) -> str:
    """The text to raise: the default one, or what the caller makes of it."""
    if message is None:
        return text
    other = message(text)
    if not isinstance(other, str):
        raise TypeError(f"message gave {type(other).__name__} instead of a text for:\n{text}")
    return other


def finite_or_none(value: float) -> float | None:
    """`value` as JSON has it, which knows no Inf."""
    return value if math.isfinite(value) else None
