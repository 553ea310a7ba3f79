"""What `update_geometry` found."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from pytest_subnet.tables import table
from pytest_subnet.text import column, facts, percent, plural, short_dtype

if TYPE_CHECKING:
    from collections.abc import Mapping

ROUNDING = "rounding"
"""How `lifts` names what is left beyond the precision gate."""


class MaskShare(NamedTuple):
    """How much of an update lies in a mask, and how much would by chance or by rounding.

    Attributes:
        numel: entries.
        updated: those that are updated.
        members: those in the mask.
        both: updated entries in the mask.
        expected: how many the result's null expects there; None without a null.
        variance: of that; None where the null has no closed form for it.
        expected_by_rounding: how many of as many updated entries lie there if the update has no
            structure and the energy that was observed, and is rounded to its storage; None where
            nothing is rounded to 16 bits or it cannot be known.
        lifts: `both` over what each null expects, by its name, and over what rounding does, under
            `"rounding"`; without those that expect none.
    """

    numel: int
    updated: int
    members: int
    both: int
    expected: float | None
    variance: float | None
    expected_by_rounding: float | None
    lifts: dict[str, float]

    @property
    def share(self) -> float | None:
        """Share of the update that lies in the mask; None where nothing is updated."""
        return self._of_update(self.both)

    @property
    def by_chance(self) -> float | None:
        """The share that the null expects."""
        return self._of_update(self.expected)

    @property
    def by_rounding(self) -> float | None:
        """The share that rounding alone gives."""
        return self._of_update(self.expected_by_rounding)

    @property
    def of_entries(self) -> float:
        """Share of all entries that are in the mask: what the papers hold `share` against."""
        return self.members / self.numel

    @property
    def bare_lift(self) -> float | None:
        """`share` over `of_entries`."""
        return None if self.share is None else self.share / self.of_entries

    @property
    def lift(self) -> float | None:
        """Updated entries in the mask over what the null expects; None where it expects none."""
        return self.both / self.expected if self.expected else None

    @property
    def rounding_lift(self) -> float | None:
        """The same over what rounding alone gives; None where that is not known."""
        return self.lifts.get(ROUNDING)

    @property
    def z(self) -> float | None:
        """Standard deviations above the null; None where nothing is left to chance."""
        if self.expected is None or not self.variance:
            return None
        return (self.both - self.expected) / math.sqrt(self.variance)

    def beyond(self) -> tuple[float, ...]:
        """The lifts that a bound applies to: over the null and over rounding, or the bare one."""
        if self.expected is None:
            return () if self.bare_lift is None else (self.bare_lift,)
        if self.lift is None:
            return ()
        return (self.lift,) if self.rounding_lift is None else (self.lift, self.rounding_lift)

    def to_dict(self, name: str) -> dict[str, object]:
        """Plain JSON types, each under a name that starts with the mask's."""
        return {
            f"{name}_share": self.share,
            f"{name}_of_entries": self.of_entries,
            f"{name}_by_chance": self.by_chance,
            f"{name}_by_rounding": self.by_rounding,
            f"{name}_z": self.z,
            f"{name}_lifts": dict(self.lifts),
        }

    def _of_update(self, count: float | None) -> float | None:
        return count / self.updated if count is not None and self.updated else None


class TensorGeometry(NamedTuple):
    """Where the update of one matrix lies.

    Attributes:
        name: its name in the base; `experts[3]` in a stack, `c_attn.weight[q]` where a fused one
            was taken apart.
        shape: `(m, n)`.
        dtype: in which it was compared.
        layer: the number of its block; None outside the blocks.
        kind: what it is for; `q_proj` for the part `q`.
        principal: against the largest entries of its part of low rank.
        low_magnitude: against its smallest entries.
    """

    name: str
    shape: tuple[int, int]
    dtype: str
    layer: int | None
    kind: str
    principal: MaskShare
    low_magnitude: MaskShare

    @property
    def numel(self) -> int:
        """Its entries."""
        return self.principal.numel

    @property
    def updated(self) -> int:
        """Those that are updated."""
        return self.principal.updated


@dataclass(frozen=True, slots=True, repr=False)
class UpdateGeometry:
    """Where in its matrices an update lies.

    Attributes:
        null: what chance keeps fixed, as in `mask_overlap`; None for the bare numbers.
        fraction: of each matrix's entries, in either mask.
        rank: of the part whose largest entries are principal.
        pair: `base -> tuned`.
        tolerance: under which an entry counts as updated, in words.
        matrices_total: how many matrices the pair has.
        notes: what a reader of the numbers must know.
        principal: the update against the largest entries of each matrix's part of low rank.
        low_magnitude: the update against each matrix's smallest entries.
        per_tensor: the same matrix by matrix.
        fingerprints: of base and tuned, taken when they are asked for.
    """

    null: str | None
    fraction: float
    rank: int
    pair: str
    tolerance: str
    matrices_total: int
    notes: tuple[str, ...]
    principal: MaskShare
    low_magnitude: MaskShare
    per_tensor: tuple[TensorGeometry, ...]
    fingerprints: Mapping[str, str] = field(default_factory=dict, compare=False, repr=False)

    @property
    def principal_lift(self) -> float | None:
        """What is left of the principal lift: the larger of that over the null and over rounding.

        Over the mask's share of the entries where there is no null; None where the null expects no
        principal entry to be updated.
        """
        return max(self.principal.beyond(), default=None)

    @property
    def low_magnitude_lift(self) -> float | None:
        """What is left of the low-magnitude lift: the smaller of the two; else as above.

        Under `"exponent"` it is that over rounding. The exponents tell small weights from large
        ones, and leave to chance only the one at the edge of the mask, so that the lift over that
        null is near 1 wherever the update lies; what it has to say is in `low_magnitude.z`.
        """
        over_rounding = self.low_magnitude.rounding_lift
        if self.null == "exponent" and over_rounding is not None:
            return over_rounding
        return min(self.low_magnitude.beyond(), default=None)

    @property
    def numel(self) -> int:
        """Entries of all of the matrices."""
        return self.principal.numel

    @property
    def updated(self) -> int:
        """Those that are updated."""
        return self.principal.updated

    @property
    def dtype(self) -> str:
        """Their dtypes, joined by `+`."""
        return "+".join(sorted({short_dtype(each.dtype) for each in self.per_tensor}))

    def coverage(self) -> list[tuple[str, str]]:
        """The lines of a message that say what was measured."""
        matrices = f"{len(self.per_tensor):,}/{plural(self.matrices_total, 'matrix')}"
        lines = [
            (
                "pair",
                f"{self.pair}   ({self.tolerance}, {self.dtype}, {matrices}, "
                f"{plural(self.numel, 'entry')})",
            ),
            (
                "updated",
                f"{plural(self.updated, 'entry')}, density {percent(self.updated / self.numel)}",
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
                "updated": percent(each.updated / each.numel),
                **_cells("principal", each.principal),
                **_cells("low", each.low_magnitude),
            }
            for each in self.per_tensor
        ]

    def table(self) -> str:
        """The rows as text, under lines that say what was measured."""
        rows = self.rows()
        numbers = [name for name in rows[0] if name not in ("tensor", "kind")]
        return f"{facts(repr(self), self.coverage())}\n\n{table(rows, right=numbers)}"

    def to_dict(self) -> dict[str, object]:
        """Plain JSON types, for reports and baselines."""
        return {
            "finding": "update_geometry",
            "null": self.null,
            "fraction": self.fraction,
            "rank": self.rank,
            "principal_lift": self.principal_lift,
            "low_magnitude_lift": self.low_magnitude_lift,
            **self.principal.to_dict("principal"),
            **self.low_magnitude.to_dict("low_magnitude"),
            "updated": self.updated,
            "pair": self.pair,
            "tolerance": self.tolerance,
            "dtype": self.dtype,
            "tensors": len(self.per_tensor),
            "tensors_total": self.matrices_total,
            "numel": self.numel,
            "notes": list(self.notes),
        }

    def __repr__(self) -> str:
        """One line that reads well in a failed `assert`."""
        lifts = ""
        if self.null is not None:
            lifts = (
                f"principal_lift={_short(self.principal_lift)}, "
                f"low_magnitude_lift={_short(self.low_magnitude_lift)}, "
            )
        return (
            f"UpdateGeometry({lifts}principal={percent(self.principal.share or 0.0)}, "
            f"low_magnitude={percent(self.low_magnitude.share or 0.0)}, "
            f"{plural(len(self.per_tensor), 'matrix')}, null={self.null!r})"
        )


def _cells(name: str, share: MaskShare) -> dict[str, object]:
    cells = {
        name: share.share,
        f"{name} by chance": share.by_chance,
        f"{name} by rounding": share.by_rounding,
    }
    shown: dict[str, object] = {
        each: "" if value is None else percent(value) for each, value in cells.items()
    }
    shown[f"{name} lift"] = "" if share.lift is None else f"{share.lift:.3g}"
    return shown


def _short(value: float | None) -> str:
    return "None" if value is None else f"{value:.4g}"
