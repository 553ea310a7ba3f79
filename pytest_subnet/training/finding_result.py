"""What `find_subnetwork` found."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeAlias

from pytest_subnet.tables import table
from pytest_subnet.text import percent, plural

if TYPE_CHECKING:
    from pytest_subnet.masks.update_mask import UpdateMask

Stopped: TypeAlias = Literal["settled", "max_steps"]


class SearchStep(NamedTuple):
    """One step of a search.

    Attributes:
        loss: as the function given returned it, without the penalty on the mask's size.
        kept: entries whose sigmoid was above 0.9 after the step.
        undecided: those between 0.1 and 0.9.
    """

    loss: float
    kept: int
    undecided: int


@dataclass(frozen=True, slots=True)
class SubnetworkRun:
    """What came of one λ.

    Attributes:
        lambda_: the weight of the penalty on the mask's size.
        mask: the entries kept.
        score: what the function given made of the model under the mask; None without one.
        stopped: `"settled"` when hardly an entry was undecided any more, else `"max_steps"`.
        retrained: how often the search began again because of a spike of the loss.
        stable: False where the last attempt had a spike of the loss, too.
        history: the steps of the last attempt.
    """

    lambda_: float
    mask: UpdateMask
    score: float | None
    stopped: Stopped
    retrained: int
    stable: bool
    history: tuple[SearchStep, ...]

    @property
    def steps(self) -> int:
        """Of the last attempt."""
        return len(self.history)


@dataclass(frozen=True, slots=True, repr=False)
class FoundSubnetwork:
    """A subnetwork, and how it was found.

    Attributes:
        runs: one for each λ, in their order.
        chosen: the place of the one that was taken.
    """

    runs: tuple[SubnetworkRun, ...]
    chosen: int

    @property
    def run(self) -> SubnetworkRun:
        """The one that was taken."""
        return self.runs[self.chosen]

    @property
    def mask(self) -> UpdateMask:
        """Its mask: True where the weight is kept."""
        return self.run.mask

    @property
    def lambda_(self) -> float:
        """Its λ."""
        return self.run.lambda_

    @property
    def score(self) -> float | None:
        """Its score; None where no function for it was given."""
        return self.run.score

    @property
    def history(self) -> tuple[SearchStep, ...]:
        """Its steps, one after the other."""
        return self.run.history

    @property
    def steps(self) -> int:
        """How many those are."""
        return self.run.steps

    @property
    def stopped(self) -> Stopped:
        """Why it ended: `"settled"` or `"max_steps"`."""
        return self.run.stopped

    @property
    def retrained(self) -> int:
        """How often it began again."""
        return self.run.retrained

    def rows(self) -> list[dict[str, object]]:
        """One row a λ."""
        return [
            {
                "λ": f"{each.lambda_:g}",
                "kept": f"{each.mask.count:,}",
                "density": percent(each.mask.density),
                "score": "" if each.score is None else f"{each.score:.4f}",
                "steps": f"{each.steps:,}",
                "stopped": each.stopped,
                "retrained": each.retrained,
                "stable": "yes" if each.stable else "no",
                "chosen": "yes" if place == self.chosen else "",
            }
            for place, each in enumerate(self.runs)
        ]

    def table(self) -> str:
        """The rows as text, under what was found."""
        numbers = ["λ", "kept", "density", "score", "steps", "retrained"]
        return f"{self!r}\n\n{table(self.rows(), right=numbers)}"

    def to_dict(self) -> dict[str, object]:
        """Plain JSON types; masks as counts, histories as their last loss."""
        return {
            "lambda": self.lambda_,
            "runs": [
                {
                    "lambda": each.lambda_,
                    "count": each.mask.count,
                    "numel": each.mask.numel,
                    "density": each.mask.density,
                    "score": each.score,
                    "steps": each.steps,
                    "stopped": each.stopped,
                    "retrained": each.retrained,
                    "stable": each.stable,
                    "loss": each.history[-1].loss,
                }
                for each in self.runs
            ],
        }

    def __repr__(self) -> str:
        """One line: how much is kept, under which λ, and why it ended."""
        score = "" if self.score is None else f", score={self.score:.4g}"
        unstable = "" if self.run.stable else ", unstable"
        return (
            f"FoundSubnetwork({self.mask.count:,} of {self.mask.numel:,} entries, "
            f"λ={self.lambda_:g}{score}, {self.stopped} after {plural(self.steps, 'step')}"
            f"{unstable})"
        )
