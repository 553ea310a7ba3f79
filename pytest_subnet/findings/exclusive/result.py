"""What masks share, and what each task's training moved, in numbers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from pytest_subnet.findings.dynamics.result import trajectory_rows
from pytest_subnet.tables import table
from pytest_subnet.text import facts, percent, plural, safe

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pytest_subnet.findings.common.result import Coverage


class SharedTensor(NamedTuple):
    """One tensor of several masks.

    Attributes:
        name: its name in the masks.
        shape: of the tensor.
        dtype: as the first mask has it.
        numel: its entries.
        assigned: entries of all masks, one that several hold counted for each.
        union: entries that any mask holds.
        shared: entries that two or more masks hold.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    numel: int
    assigned: int
    union: int
    shared: int


@dataclass(frozen=True, slots=True, repr=False)
class MasksExclusive:
    """Which entries several masks share.

    Attributes:
        masks: how messages call each, in the order given.
        counts: entries of each.
        first_counts: of these, the ones that no mask before it holds.
        per_tensor: the tensors covered, as `SharedTensor`.
        fingerprints: of the checkpoints that each mask was made from, where it knows.
    """

    masks: tuple[str, ...]
    counts: tuple[int, ...]
    first_counts: tuple[int, ...]
    per_tensor: tuple[SharedTensor, ...]
    fingerprints: Mapping[str, str] = field(default_factory=dict, compare=False, repr=False)

    @property
    def numel(self) -> int:
        """Entries of the tensors covered."""
        return sum(each.numel for each in self.per_tensor)

    @property
    def union(self) -> int:
        """Entries that any mask holds."""
        return sum(each.union for each in self.per_tensor)

    @property
    def shared(self) -> int:
        """Entries that two or more masks hold."""
        return sum(each.shared for each in self.per_tensor)

    @property
    def overlap(self) -> float:
        """Share of the entries that any mask holds which two or more hold."""
        return self.shared / self.union

    @property
    def used(self) -> float:
        """Share of all entries that any mask holds: the capacity in use."""
        return self.union / self.numel

    def rows(self) -> list[dict[str, object]]:
        """One row a mask, for tables and reports."""
        return [
            {
                "mask": safe(name),
                "entries": f"{count:,}",
                "density": percent(count / self.numel),
                "in no mask before": f"{first:,}",
                "share": percent(first / count),
            }
            for name, count, first in zip(self.masks, self.counts, self.first_counts, strict=True)
        ]

    def table(self) -> str:
        """The rows as text, under lines that say what was measured."""
        rows = self.rows()
        used = f"{self.union:,} / {plural(self.numel, 'entry')}   ({percent(self.used)})"
        return f"{facts(repr(self), [('used', used)])}\n\n{table(rows, right=list(rows[0])[1:])}"

    def to_dict(self) -> dict[str, object]:
        """Plain JSON types, for reports and baselines."""
        return {
            "finding": "masks_exclusive",
            "masks": list(self.masks),
            "overlap": self.overlap,
            "shared": self.shared,
            "union": self.union,
            "used": self.used,
            "numel": self.numel,
            "counts": list(self.counts),
            "first_counts": list(self.first_counts),
        }

    def __repr__(self) -> str:
        """One line that reads well in a failed `assert`."""
        return (
            f"MasksExclusive(overlap={self.overlap:.6g}, {self.shared:,} of {self.union:,} in "
            f"{plural(len(self.masks), 'mask')} shared)"
        )


class ExclusiveStep(NamedTuple):
    """What training one task moved: entries with other bits than in the checkpoint before.

    Attributes:
        name: of the checkpoint; not escaped.
        previous: of the one before.
        task: how messages call the task's mask; not escaped.
        number: of the step, from 1.
        exclusive: entries of the task's mask that no earlier mask holds.
        moved: entries moved, buffers and integer tensors included.
        outside: of these, the ones outside the task's mask.
        earlier: of those moved, the ones that an earlier mask holds.
    """

    name: str
    previous: str
    task: str
    number: int
    exclusive: int
    moved: int
    outside: int
    earlier: int


class ExclusiveTensor(NamedTuple):
    """One tensor of a run of tasks.

    Attributes:
        name: its name in the first checkpoint.
        shape: of the tensor.
        dtype: in which it is compared.
        numel: its entries.
        moved: entries moved, over all steps.
        outside: of these, the ones outside the mask of their step.
        earlier: of those moved, the ones that a mask of an earlier step holds.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    numel: int
    moved: int
    outside: int
    earlier: int


@dataclass(frozen=True, slots=True, repr=False)
class ExclusiveUpdates:
    """What training each task of a run moved, by bits.

    Attributes:
        coverage: trajectory, dtype, tensors and entries measured.
        steps: one a task, as `ExclusiveStep`.
        per_tensor: the tensors measured, buffers and integer tensors included.
        changed_masks: masks that a later snapshot has with other entries, in words.
    """

    coverage: Coverage
    steps: tuple[ExclusiveStep, ...]
    per_tensor: tuple[ExclusiveTensor, ...]
    changed_masks: tuple[str, ...] = ()

    @property
    def numel(self) -> int:
        """Entries measured."""
        return self.coverage.numel

    @property
    def moved(self) -> int:
        """Entries moved, over all steps."""
        return sum(step.moved for step in self.steps)

    @property
    def outside(self) -> int:
        """Of these, the ones outside the mask of their step."""
        return sum(step.outside for step in self.steps)

    @property
    def earlier(self) -> int:
        """Of those moved, the ones that a mask of an earlier step holds."""
        return sum(step.earlier for step in self.steps)

    @property
    def fingerprints(self) -> Mapping[str, str]:
        """Of the first checkpoint and the last; each is taken when it is asked for."""
        return self.coverage.fingerprints

    def rows(self) -> list[dict[str, object]]:
        """One row a step, for tables and reports."""
        return [
            {
                "task": safe(step.task),
                "checkpoint": safe(step.name),
                "exclusive": f"{step.exclusive:,}",
                "moved": f"{step.moved:,}",
                "outside": f"{step.outside:,}",
                "in earlier masks": f"{step.earlier:,}",
            }
            for step in self.steps
        ]

    def table(self) -> str:
        """The rows as text, under lines that say what was measured."""
        rows = self.rows()
        head = facts(repr(self), trajectory_rows(self.coverage))
        return f"{head}\n\n{table(rows, right=list(rows[0])[2:])}"

    def to_dict(self) -> dict[str, object]:
        """Plain JSON types, for reports and baselines."""
        return {
            "finding": "exclusive_updates",
            "tasks": [step.task for step in self.steps],
            "moved": [step.moved for step in self.steps],
            "outside": [step.outside for step in self.steps],
            "earlier": [step.earlier for step in self.steps],
            "exclusive": [step.exclusive for step in self.steps],
            "changed_masks": list(self.changed_masks),
            **self.coverage.to_dict(),
        }

    def __repr__(self) -> str:
        """One line that reads well in a failed `assert`."""
        return (
            f"ExclusiveUpdates({plural(len(self.steps), 'task')}, moved={self.moved:,}, "
            f"outside={self.outside:,}, earlier={self.earlier:,}, same bits)"
        )
