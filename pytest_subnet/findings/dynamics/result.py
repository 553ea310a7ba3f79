"""What a run's update is, checkpoint by checkpoint, in numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from pytest_subnet.tables import table
from pytest_subnet.text import facts, percent, plural, safe

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pytest_subnet.findings.common.result import Coverage
    from pytest_subnet.scan.tolerance import Tolerance

BAND = 0.01
"""How far from its last value the sparsity may be where it has levelled off."""


class DynamicsStep(NamedTuple):
    """One checkpoint of a run, against the start and against the one before.

    Attributes:
        name: of the checkpoint; not escaped.
        previous: of the one before.
        number: its place in the run; the start has 0.
        numel: entries measured.
        updated: entries updated against the start.
        stepped: entries updated against the checkpoint before.
        moved: entries with other bits than in the checkpoint before, whatever the tolerance,
            without the zeros that only changed their sign.
        ever: entries updated against the start in this checkpoint or an earlier one.
        outside: of `ever`, those that are not updated in the last checkpoint.
        matrices: tensors of two or more dimensions.
        stalled: of these, those in which nothing moved since the checkpoint before.
    """

    name: str
    previous: str
    number: int
    numel: int
    updated: int
    stepped: int
    moved: int
    ever: int
    outside: int
    matrices: int
    stalled: int

    @property
    def sparsity(self) -> float:
        """Share of entries that are as in the start."""
        return (self.numel - self.updated) / self.numel

    @property
    def step_sparsity(self) -> float:
        """Share of entries that are as in the checkpoint before."""
        return (self.numel - self.stepped) / self.numel

    @property
    def ever_share(self) -> float:
        """Share of entries that were updated so far."""
        return self.ever / self.numel

    @property
    def outside_share(self) -> float:
        """Of the entries that were updated so far, the share outside the final subnetwork.

        0 where none was.
        """
        return self.outside / self.ever if self.ever else 0.0

    @property
    def stalled_share(self) -> float | None:
        """Share of matrices in which nothing moved; None where there is no matrix."""
        return self.stalled / self.matrices if self.matrices else None


class TensorDynamics(NamedTuple):
    """How one tensor's update came about.

    Attributes:
        name: its name in the first checkpoint.
        shape: of the tensor.
        dtype: in which it is compared.
        layer: the number of its block; None outside the blocks.
        kind: what it is for.
        numel: its entries.
        never: entries never updated.
        cancelled: entries updated in some checkpoint and not in the last.
        final: entries updated in the last checkpoint.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    layer: int | None
    kind: str
    numel: int
    never: int
    cancelled: int
    final: int

    @property
    def sparsity(self) -> float:
        """Share of entries not updated in the last checkpoint."""
        return (self.never + self.cancelled) / self.numel


@dataclass(frozen=True, slots=True, repr=False)
class UpdateDynamics:
    """Which entries a run updated for good, which it updated and put back, and when.

    `never + cancelled + final` is all entries, and `never + cancelled` those that `update_sparsity`
    finds unchanged between the first and the last checkpoint.

    Attributes:
        coverage: trajectory, tolerance, dtype, tensors and entries measured.
        never: entries that no checkpoint shows updated against the start.
        cancelled: entries that some checkpoint shows updated and the last one does not. What was
            undone between two checkpoints is not seen: it is a lower bound.
        final: entries that the last checkpoint shows updated.
        steps: every checkpoint but the first, as `DynamicsStep`.
        per_tensor: the tensors measured, as `TensorDynamics`.
        nonfinite: NaN and Inf in each checkpoint, the first one included.
    """

    coverage: Coverage
    never: int
    cancelled: int
    final: int
    steps: tuple[DynamicsStep, ...]
    per_tensor: tuple[TensorDynamics, ...]
    nonfinite: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Entries measured."""
        return self.coverage.numel

    @property
    def never_share(self) -> float:
        """Share of entries never updated."""
        return self.never / self.numel

    @property
    def cancelled_share(self) -> float:
        """Share of entries updated on the way and not in the end."""
        return self.cancelled / self.numel

    @property
    def final_share(self) -> float:
        """Share of entries updated in the end: the density of the whole update."""
        return self.final / self.numel

    @property
    def sparsity(self) -> float:
        """Share of entries not updated in the end: never and cancelled together."""
        return (self.never + self.cancelled) / self.numel

    @property
    def density(self) -> float:
        """Share of entries updated in the end: 1 - sparsity."""
        return self.final_share

    @property
    def dtype(self) -> str:
        """The dtype compared; several are joined by `+`."""
        return self.coverage.dtype

    @property
    def tolerance(self) -> Tolerance:
        """Under which an entry counts as updated."""
        return self.coverage.tolerance

    @property
    def fingerprints(self) -> Mapping[str, str]:
        """Of the first checkpoint and the last; each is taken when it is asked for."""
        return self.coverage.fingerprints

    @property
    def nothing_moved(self) -> bool:
        """Whether no entry changed its value in any step; a zero that changed its sign did not."""
        return not any(step.moved for step in self.steps)

    def levels_off(self, band: float = BAND) -> DynamicsStep | None:
        """The first step from which the sparsity against the start stays near its last value.

        Args:
            band: fraction in [0, 1]: how far from its last value it may be from there on.

        Returns:
            The step; None where only the last one is within the band, which compares it with
            itself.
        """
        last = self.steps[-1]
        level = None
        for step in reversed(self.steps[:-1]):
            # Whole numbers up to the last division: 0.8 - 0.7 would be above 0.1.
            if abs(step.updated - last.updated) / self.numel > band:
                break
            level = step
        return level

    def rows(self) -> list[dict[str, object]]:
        """One row a step, for tables and reports."""
        return [
            {
                "checkpoint": step.name,
                "sparsity": percent(step.sparsity),
                "step sparsity": percent(step.step_sparsity),
                "ever updated": percent(step.ever_share),
                "of these outside": percent(step.outside_share),
                "stalled matrices": f"{step.stalled:,} of {step.matrices:,}",
            }
            for step in self.steps
        ]

    def table(self) -> str:
        """The rows as text, under lines that say what was measured."""
        shares = [
            ("never", f"{percent(self.never_share)} of the entries"),
            ("cancelled", f"{percent(self.cancelled_share)}, or more between checkpoints"),
            ("final", percent(self.final_share)),
            ("levels off", self._level()),
        ]
        head = facts(repr(self), [*trajectory_rows(self.coverage), *shares])
        rows = self.rows()
        return f"{head}\n\n{table(rows, right=list(rows[0])[1:])}"

    def _level(self) -> str:
        level = self.levels_off()
        if level is None:
            return f"not within {percent(BAND)}"
        return f"at {safe(level.name)}, within {percent(BAND)}"

    def to_dict(self) -> dict[str, object]:
        """Plain JSON types, for reports and baselines."""
        level = self.levels_off()
        return {
            "finding": "update_dynamics",
            "never": self.never_share,
            "cancelled": self.cancelled_share,
            "final": self.final_share,
            "sparsity": self.sparsity,
            "density": self.density,
            "levels_off": None if level is None else level.name,
            "checkpoints": [step.name for step in self.steps],
            "sparsities": [step.sparsity for step in self.steps],
            "step_sparsities": [step.step_sparsity for step in self.steps],
            "stalled": [step.stalled for step in self.steps],
            "nonfinite": list(self.nonfinite),
            **self.coverage.to_dict(),
        }

    def __repr__(self) -> str:
        """One line that reads well in a failed `assert`."""
        return (
            f"UpdateDynamics(never={self.never_share:.4g}, cancelled={self.cancelled_share:.4g}, "
            f"final={self.final_share:.4g}, {plural(len(self.steps), 'step')}, {self.tolerance}, "
            f"{self.dtype})"
        )


def trajectory_rows(coverage: Coverage) -> list[tuple[str, str]]:
    """The lines of a message that say what was measured, of a run."""
    first, *notes = coverage.rows()
    return [("run", first[1]), *notes]
