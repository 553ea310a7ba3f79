"""What a model scores with a part of its weights filled, beside random parts of the same size."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from pytest_subnet.tables import table
from pytest_subnet.text import column, facts, percent, plural

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pytest_subnet.findings.subnetworks.models import Covered

FILLS = {
    "base": "the values of the base",
    "zero": "zeros",
    "mean": "the mean of each tensor",
}
"""What entries are filled with, by `fill`."""


@dataclass(frozen=True, slots=True, repr=False)
class SubnetworkScores:
    """Scores of the tuned model as it is and with entries filled; higher is better.

    Attributes:
        pair: which models.
        mask: what the mask was made from.
        fill: with what entries are filled: `"base"`, `"zero"` or `"mean"`.
        full: the score of the tuned model as it is.
        subnetwork: with what the mask covers filled outside the mask.
        complement: with the mask's entries filled.
        filled: with all that the mask covers filled.
        random: likewise for random masks with as many entries in each tensor, one score a mask:
            of what the finding is about, subnetworks or complements.
        seed: of the random masks.
        restored: whether the weights were put back to the bit; a result is made only if they were.
        tensors_total: how many weights the model has.
        numel_total: how many entries they have.
        notes: which weights stay as tuned because the mask does not cover them; ties; whether
            random masks hardly fill anything.
        per_tensor: the tensors that the mask covers, as `Covered`.
        fingerprints: of base and tuned; each is taken when it is asked for.
    """

    finding: ClassVar[str]
    about: ClassVar[str]

    pair: str
    mask: str
    fill: str
    full: float
    subnetwork: float
    complement: float
    filled: float
    random: tuple[float, ...]
    seed: int
    restored: bool
    tensors_total: int
    numel_total: int
    notes: tuple[str, ...]
    per_tensor: tuple[Covered, ...]
    fingerprints: Mapping[str, str] = field(default_factory=dict, compare=False)

    @property
    def count(self) -> int:
        """Entries in the mask."""
        return sum(each.inside for each in self.per_tensor)

    @property
    def numel(self) -> int:
        """Entries that the mask covers: of its tensors, in the mask or not."""
        return sum(each.numel for each in self.per_tensor)

    @property
    def density(self) -> float:
        """Share of the entries covered that are in the mask."""
        return self.count / self.numel

    @property
    def replaced_inside(self) -> int:
        """Entries in the mask that get other bits when they are filled."""
        return sum(each.replaced_inside for each in self.per_tensor)

    @property
    def replaced_outside(self) -> int:
        """Entries covered outside the mask that get other bits when they are filled."""
        return sum(each.replaced_outside for each in self.per_tensor)

    @property
    def replaced_by_random(self) -> float:
        """How many entries get other bits on average when those of a random mask are filled.

        The mean of all masks with as many entries in each tensor, not of those that were drawn.
        """
        return sum(each.replaced_by_random for each in self.per_tensor)

    @property
    def drop(self) -> float:
        """How far the score falls when the mask's entries are filled."""
        return self.full - self.complement

    @property
    def random_mean(self) -> float | None:
        """Mean of the scores of the random masks; None without any."""
        return statistics.fmean(self.random) if self.random else None

    @property
    def random_sd(self) -> float | None:
        """Their standard deviation, with n - 1; None with fewer than two."""
        return statistics.stdev(self.random) if len(self.random) > 1 else None

    @property
    def p_value(self) -> float | None:
        """(1 + random masks that do at least as well) / (1 + random masks); None without any.

        To do well is to score high alone, or to cost much when filled, as the finding has it. It is
        exact: were the mask a random one itself, every rank among them would be as likely.
        """
        if not self.random:
            return None
        return (1 + self.as_good) / (1 + len(self.random))

    @property
    def as_good(self) -> int:
        """How many of the random masks do at least as well."""
        raise NotImplementedError

    def rows(self) -> list[dict[str, object]]:
        """One row a model that was scored; the random masks in one."""
        scores = [
            ("full", f"{self.full:.6g}"),
            ("subnetwork", f"{self.subnetwork:.6g}"),
            ("complement", f"{self.complement:.6g}"),
            ("all filled", f"{self.filled:.6g}"),
        ]
        if self.random:
            spread = "" if self.random_sd is None else f" (sd {self.random_sd:.3g})"
            count = len(self.random)
            scores.append((f"{count} random {self.about}s", f"{self.random_mean:.6g}{spread}"))
        return [{"model": model, "score": score} for model, score in scores]

    def table(self) -> str:
        """The rows as text, under a line that says what was measured."""
        return f"{facts(repr(self), self.facts())}\n\n{table(self.rows(), right=['score'])}"

    def facts(self) -> list[tuple[str, str]]:
        """The lines of a message that say what was measured."""
        tensors = f"{len(self.per_tensor):,}/{plural(self.tensors_total, 'tensor')}"
        lines = [
            ("models", f"{self.pair}   (filled with {FILLS[self.fill]})"),
            (
                "mask",
                f"{self.mask}: {self.count:,} / {plural(self.numel, 'entry')}   "
                f"(density {percent(self.density)}, {tensors})",
            ),
        ]
        return lines + column("note", self.notes)

    def to_dict(self) -> dict[str, object]:
        """Plain JSON types, for reports and baselines."""
        return {
            "finding": self.finding,
            "pair": self.pair,
            "mask": self.mask,
            "fill": self.fill,
            "full": self.full,
            "subnetwork": self.subnetwork,
            "complement": self.complement,
            "filled": self.filled,
            "drop": self.drop,
            "p_value": self.p_value,
            "random_mean": self.random_mean,
            "random_sd": self.random_sd,
            "controls": len(self.random),
            "seed": self.seed,
            "restored": self.restored,
            "count": self.count,
            "numel": self.numel,
            "density": self.density,
            "replaced_inside": self.replaced_inside,
            "replaced_outside": self.replaced_outside,
            "replaced_by_random": self.replaced_by_random,
            "tensors": len(self.per_tensor),
            "tensors_total": self.tensors_total,
            "numel_total": self.numel_total,
            "notes": list(self.notes),
        }

    def _numbers(self) -> str:
        p = "None" if self.p_value is None else f"{self.p_value:.3g}"
        return (
            f"full={self.full:.6g}, p_value={p}, fill={self.fill!r}, "
            f"{self.count:,} of {self.numel:,} in the mask"
        )


@dataclass(frozen=True, slots=True, repr=False)
class SubnetworkSufficiency(SubnetworkScores):
    """What a subnetwork scores when the entries beside it are filled; as `SubnetworkScores`."""

    finding: ClassVar[str] = "subnetwork_sufficiency"
    about: ClassVar[str] = "subnetwork"

    @property
    def as_good(self) -> int:
        """How many random subnetworks score at least as high."""
        return sum(score >= self.subnetwork for score in self.random)

    def __repr__(self) -> str:
        """One line that reads well in a failed `assert`."""
        return f"SubnetworkSufficiency(subnetwork={self.subnetwork:.6g}, {self._numbers()})"


@dataclass(frozen=True, slots=True, repr=False)
class SubnetworkNecessity(SubnetworkScores):
    """What the model loses when a subnetwork is filled; as `SubnetworkScores`."""

    finding: ClassVar[str] = "subnetwork_necessity"
    about: ClassVar[str] = "complement"

    @property
    def as_good(self) -> int:
        """How many random subnetworks cost at least as much when they are filled."""
        return sum(score <= self.complement for score in self.random)  # exact, as no drop is

    @property
    def random_drops(self) -> tuple[float, ...]:
        """What each random subnetwork costs when it is filled."""
        return tuple(self.full - score for score in self.random)

    def __repr__(self) -> str:
        """One line that reads well in a failed `assert`."""
        return (
            f"SubnetworkNecessity(drop={self.drop:.6g}, complement={self.complement:.6g}, "
            f"{self._numbers()})"
        )
