"""What `singular_rotation` found."""

from __future__ import annotations

import math
import operator
import statistics
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeAlias

from pytest_subnet.findings.matrices.result import OfMatrices
from pytest_subnet.tables import table
from pytest_subnet.text import column, facts, plural, spell_tensor

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from pytest_subnet.findings.rotation.null import Null

Side: TypeAlias = Literal["left", "right", "both"]


class SingularRotation(NamedTuple):
    """How the k leading singular directions of one matrix turned. Angles are in degrees.

    Attributes:
        name: its name in the base; `c_attn.weight[q]` where a fused one was taken apart.
        shape: `(m, n)`.
        dtype: in which it was compared.
        layer: the number of its block; None outside the blocks.
        kind: what it is for.
        k: how many directions.
        left_deg: principal angles between the left subspaces, largest first; None if not asked.
        right_deg: the same of the right ones.
        left_vectors_deg: the angle of each left singular vector to its own; None if not asked.
            Little is meant by it where singular values are nearly equal.
        right_vectors_deg: the same of the right ones.
        gap: by how much the k-th singular value of the tuned matrix is above the next one,
            relative to it. Without a gap the subspace is not one thing, and its largest angle
            tends to 90° whatever the update.
        error_deg: by how much the angles may be off, by the residuals and gaps of both sides.
        wedin_deg: an upper bound of every angle, from the update and the gap between both
            matrices' values (Wedin 1972); None where there is no gap.
        value_energy: share of the update's energy along the base's own directions, which moves
            values: ‖diag C‖² / ‖D‖² of C = Uᵀ D V.
        turn_energy: share of it between the leading directions, which turns them.
        change_norm: Frobenius norm of the update.
        null_deg: mean angle that random updates of the same norm give; None without a null.
        null_spread_deg: standard deviation of that over the draws.
        method: how the tuned subspace was found: `"eigh"` or `"block-krylov"`.
    """

    name: str
    shape: tuple[int, int]
    dtype: str
    layer: int | None
    kind: str
    k: int
    left_deg: tuple[float, ...] | None
    right_deg: tuple[float, ...] | None
    left_vectors_deg: tuple[float, ...] | None
    right_vectors_deg: tuple[float, ...] | None
    gap: float
    error_deg: float
    wedin_deg: float | None
    value_energy: float
    turn_energy: float
    change_norm: float
    null_deg: float | None
    null_spread_deg: float | None
    method: str

    @property
    def numel(self) -> int:
        """Its entries."""
        return self.shape[0] * self.shape[1]

    @property
    def angles_deg(self) -> tuple[float, ...]:
        """The principal angles of all sides asked for, largest first."""
        return tuple(sorted((*(self.left_deg or ()), *(self.right_deg or ())), reverse=True))

    @property
    def mean_deg(self) -> float:
        """The mean principal angle: what bounds apply to."""
        return math.fsum(self.angles_deg) / len(self.angles_deg)

    @property
    def median_deg(self) -> float:
        """The median principal angle."""
        return statistics.median(self.angles_deg)

    @property
    def max_deg(self) -> float:
        """The largest principal angle, which the boundary of the subspace governs."""
        return self.angles_deg[0]

    @property
    def excess(self) -> float | None:
        """The mean angle over the null's; None without a null."""
        if self.null_deg is None:
            return None
        if self.null_deg == 0:
            return math.inf if self.mean_deg else 0.0
        return self.mean_deg / self.null_deg

    @property
    def beyond_null_deg(self) -> float:
        """The mean angle less the null's."""
        return self.mean_deg - (self.null_deg or 0.0)

    @property
    def z(self) -> float | None:
        """That in standard deviations of the null's draws; None without a null."""
        if self.null_spread_deg is None:
            return None
        if self.null_spread_deg == 0:
            return math.copysign(math.inf, self.beyond_null_deg) if self.beyond_null_deg else 0.0
        return self.beyond_null_deg / self.null_spread_deg

    @property
    def value_energy_null(self) -> float:
        """What `value_energy` is of noise: k / mn."""
        return self.k / self.numel

    @property
    def turn_energy_null(self) -> float:
        """What `turn_energy` is of noise: (k² - k) / mn."""
        return (self.k**2 - self.k) / self.numel

    @property
    def moved(self) -> bool:
        """Whether the matrix changed at all."""
        return self.change_norm > 0


@dataclass(frozen=True, slots=True, repr=False)
class SingularRotations(OfMatrices):
    """How leading singular directions turned.

    Attributes:
        pair: `base -> tuned`.
        side: `"left"`, `"right"` or `"both"`.
        null: `"gaussian"`, `"support"` or None.
        matrices_total: how many matrices the pair has.
        notes: what a reader of the numbers must know.
        per_tensor: the matrices measured, fused ones taken apart.
        fingerprints: of base and tuned, taken when they are asked for.
    """

    pair: str
    side: Side
    null: Null
    matrices_total: int
    notes: tuple[str, ...]
    per_tensor: tuple[SingularRotation, ...]
    fingerprints: Mapping[str, str] = field(default_factory=dict, compare=False, repr=False)

    @property
    def k(self) -> int:
        """How many directions, of each matrix."""
        return self.per_tensor[0].k

    @property
    def mean_deg(self) -> float:
        """The mean of the matrices' mean angles, each counting once."""
        return math.fsum(each.mean_deg for each in self.per_tensor) / len(self.per_tensor)

    @property
    def max_deg(self) -> float:
        """The largest angle of any."""
        return max(each.max_deg for each in self.per_tensor)

    @property
    def null_deg(self) -> float | None:
        """The mean of the null's mean angles; None without a null."""
        if self.null is None:
            return None
        return math.fsum(each.null_deg or 0.0 for each in self.per_tensor) / len(self.per_tensor)

    @property
    def excess(self) -> float | None:
        """The mean angle over the null's; None without a null."""
        null = self.null_deg
        if null is None:
            return None
        if null == 0:
            return math.inf if self.mean_deg else 0.0
        return self.mean_deg / null

    @property
    def value_energy(self) -> float:
        """As `SingularRotation.value_energy`, of the energy of all updates together."""
        return self._of_energy([each.value_energy for each in self.per_tensor])

    @property
    def value_energy_null(self) -> float:
        """What that is of noise."""
        return self._of_energy([each.value_energy_null for each in self.per_tensor])

    @property
    def turn_energy(self) -> float:
        """As `SingularRotation.turn_energy`, of the energy of all updates together."""
        return self._of_energy([each.turn_energy for each in self.per_tensor])

    @property
    def turn_energy_null(self) -> float:
        """What that is of noise."""
        return self._of_energy([each.turn_energy_null for each in self.per_tensor])

    def _of_energy(self, shares: Sequence[float]) -> float:
        energies = [each.change_norm**2 for each in self.per_tensor]
        whole = math.fsum(energies)
        return math.fsum(map(operator.mul, energies, shares)) / whole if whole else 0.0

    @property
    def nothing_moved(self) -> bool:
        """Whether no matrix changed."""
        return not any(each.moved for each in self.per_tensor)

    def coverage(self) -> list[tuple[str, str]]:
        """The lines of a message that say what was measured."""
        matrices = plural(len(self.per_tensor), "matrix")
        sides = "left and right" if self.side == "both" else self.side
        what = f"{self.dtype}, {matrices} of {self.matrices_total:,}"
        lines = [
            ("pair", f"{self.pair}   ({what}, {plural(self.numel, 'entry')})"),
            ("angles", f"principal, mean over the {self.k} leading {sides} directions"),
        ]
        if self.null is not None:
            where = "on the same entries" if self.null == "support" else "everywhere"
            lines.append(
                (
                    "null",
                    f"{self.null}: random updates of the same norm, {where}, turn them by "
                    f"{self.null_deg:.3g}°",
                )
            )
        return lines + column("note", self.notes)

    def rows(self) -> list[dict[str, object]]:
        """One row a matrix."""
        return [
            {
                "tensor": each.name,
                "kind": each.kind,
                "layer": "" if each.layer is None else each.layer,
                "shape": spell_tensor(each.dtype, each.shape),
                "mean": f"{each.mean_deg:.3g}°",
                "max": f"{each.max_deg:.3g}°",
                "null": "" if each.null_deg is None else f"{each.null_deg:.3g}°",
                "excess": "" if each.excess is None else f"{each.excess:.3g}",
                "z": "" if each.z is None else f"{each.z:.1f}",
                "gap": f"{each.gap:.2g}",
                "off by": f"{each.error_deg:.1g}°",
                "by": each.method,
            }
            for each in self.per_tensor
        ]

    def table(self) -> str:
        """The rows as text, under a line that says what was measured."""
        numbers = ["layer", "mean", "max", "null", "excess", "z", "gap", "off by"]
        head = facts(repr(self), [*self.coverage(), *self._energies()])
        return f"{head}\n\n{table(self.rows(), right=numbers)}"

    def _energies(self) -> list[tuple[str, str]]:
        """What of the update lies between the leading directions, which it moves or turns."""
        if self.nothing_moved:
            return []
        parts = (
            (self.value_energy, "moves their values", self.value_energy_null),
            (self.turn_energy, "turns them into each other", self.turn_energy_null),
        )
        texts = [f"{_of(share)} {what} (of noise {_of(null)})" for share, what, null in parts]
        return [("energy", ", ".join(texts))]

    def to_dict(self) -> dict[str, object]:
        """Plain JSON types, for reports and baselines."""
        excess = self.excess
        return {
            "finding": "singular_rotation",
            "mean_deg": self.mean_deg,
            "max_deg": self.max_deg,
            "null": self.null,
            "null_deg": self.null_deg,
            "excess": excess if excess is not None and math.isfinite(excess) else None,
            "k": self.k,
            "side": self.side,
            "value_energy": self.value_energy,
            "value_energy_null": self.value_energy_null,
            "turn_energy": self.turn_energy,
            "turn_energy_null": self.turn_energy_null,
            "pair": self.pair,
            "dtype": self.dtype,
            "tensors": len(self.per_tensor),
            "tensors_total": self.matrices_total,
            "numel": self.numel,
            "notes": list(self.notes),
        }

    def __repr__(self) -> str:
        """One line that reads well in a failed `assert`."""
        excess = "" if self.excess is None else f", excess={self.excess:.3g}"
        return (
            f"SingularRotations(mean_deg={self.mean_deg:.4g}{excess}, k={self.k}, {self.side}, "
            f"{plural(len(self.per_tensor), 'matrix')}, {self.dtype})"
        )


def _of(share: float) -> str:
    """Percent to three digits: what noise has of a large matrix is far below 0.01 %."""
    return f"{100 * share:.3g}%"
