"""In which groups of a model's tensors the entries of a mask lie."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from pytest_subnet.tables import table
from pytest_subnet.text import column, facts, percent, plural, safe

if TYPE_CHECKING:
    from collections.abc import Mapping


class GroupShare(NamedTuple):
    """One group of tensors.

    Attributes:
        name: of the group.
        tensors: how many it has; a part of a fused one is one.
        inside: entries in the mask.
        numel: entries in all.
        share: of the mask's entries, those that lie in the group.
        parameter_share: of all entries covered, those that the group has: what a uniform mask
            would have there.
        lift: the share over that; 1 for a uniform mask.
    """

    name: str
    tensors: int
    inside: int
    numel: int
    share: float
    parameter_share: float
    lift: float

    @property
    def density(self) -> float:
        """Share of the group's entries that are in the mask."""
        return self.inside / self.numel


@dataclass(frozen=True, slots=True, repr=False)
class MaskConcentration:
    """How a mask is spread over groups of tensors.

    Shares are of the mask's entries in the tensors selected; parameter shares are of all entries of
    these tensors, embeddings, norms and biases included where the mask covers them.

    Attributes:
        mask: what the mask was made from.
        by: what a group is.
        tensors: how many tensors are selected.
        tensors_total: how many the mask covers.
        count: entries of the mask in them.
        numel: their entries.
        groups: the largest share first.
        notes: fused tensors that were not taken apart.
        fingerprints: of base and tuned checkpoint, as far as the mask knows them.
    """

    mask: str
    by: str
    tensors: int
    tensors_total: int
    count: int
    numel: int
    groups: tuple[GroupShare, ...]
    notes: tuple[str, ...] = ()
    fingerprints: Mapping[str, str] = field(default_factory=dict, compare=False)

    @property
    def density(self) -> float:
        """Share of the entries that are in the mask."""
        return self.count / self.numel

    @property
    def plurality(self) -> str | None:
        """The group with the largest share, be it the majority or not; None where two have it."""
        first, *others = self.groups
        return None if others and others[0].inside == first.inside else first.name

    def __getitem__(self, group: str) -> GroupShare:
        """One group by its name."""
        return next(each for each in self.groups if each.name == group)

    def rows(self) -> list[dict[str, object]]:
        """One row a group, for tables and reports."""
        return [
            {
                self.by: each.name,
                "tensors": f"{each.tensors:,}",
                "in mask": f"{each.inside:,}",
                "entries": f"{each.numel:,}",
                "share": percent(each.share),
                "of parameters": percent(each.parameter_share),
                "lift": f"{each.lift:.3g}",
            }
            for each in self.groups
        ]

    def table(self) -> str:
        """The rows as text, under a line that says what was measured."""
        numbers = ["tensors", "in mask", "entries", "share", "of parameters", "lift"]
        return f"{facts(repr(self), self.facts())}\n\n{table(self.rows(), right=numbers)}"

    def facts(self) -> list[tuple[str, str]]:
        """The lines of a message that say what was measured."""
        tensors = f"{self.tensors:,}/{plural(self.tensors_total, 'tensor')}"
        return [
            (
                "mask",
                f"{self.mask}: {self.count:,} / {plural(self.numel, 'entry')}   "
                f"(density {percent(self.density)}, {tensors})",
            ),
            *column("note", self.notes),
        ]

    def to_dict(self) -> dict[str, object]:
        """Plain JSON types, for reports and baselines."""
        return {
            "finding": "mask_concentration",
            "mask": self.mask,
            "by": self.by,
            "plurality": self.plurality,
            "count": self.count,
            "numel": self.numel,
            "density": self.density,
            "tensors": self.tensors,
            "tensors_total": self.tensors_total,
            "groups": {
                each.name: {
                    "inside": each.inside,
                    "numel": each.numel,
                    "share": each.share,
                    "parameter_share": each.parameter_share,
                    "lift": each.lift,
                }
                for each in self.groups
            },
            "notes": list(self.notes),
        }

    def __repr__(self) -> str:
        """One line that reads well in a failed `assert`."""
        first = self.groups[0]
        return (
            f"MaskConcentration({safe(first.name)}: share {first.share:.6g}, lift "
            f"{first.lift:.4g}, of {plural(len(self.groups), 'group')} by {self.by}, "
            f"{self.count:,} of {self.numel:,} in the mask)"
        )
