"""What a published number is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pytest_subnet.scan.tolerance import Tolerance

RL_SUBNETWORKS = "arXiv 2505.11711"
"""Reinforcement Learning Finetunes Small Subnetworks in Large Language Models."""

PATH_NOT_TAKEN = "arXiv 2511.08567"
"""The Path Not Taken: RLVR learns off the principals."""

DISTILLATION = "arXiv 2606.07082"
"""The geometry of on-policy distillation."""

PULSE = "arXiv 2602.03839"
"""Weight synchronisation of what a step changes in bfloat16."""


@dataclass(frozen=True, slots=True)
class PublishedSparsity:
    """One sparsity of an update, as printed.

    Attributes:
        source: the paper: `"arXiv 2505.11711"`.
        table: where in it: `"Table 6"`, `"text"`.
        algorithm: `"GRPO"`, `"SFT"`, …; `"RLVR"` where the source does not say more.
        base: the model before; empty where the source does not name it.
        tuned: the model after; likewise.
        tolerance: under which entries count as updated; None where the source does not say.
        dtype: of the weights, as torch names it; empty where the source does not say.
        sparsity: fraction in [0, 1] of the entries that did not change.
        note: what to know before comparing with it.
    """

    source: str
    table: str
    algorithm: str
    base: str
    tuned: str
    tolerance: Tolerance | None
    dtype: str
    sparsity: float
    note: str = ""

    @property
    def density(self) -> float:
        """Share of entries that changed."""
        return 1 - self.sparsity


@dataclass(frozen=True, slots=True)
class PublishedOverlap:
    """How far the updates of two runs cover each other, as printed (2505.11711, Table 4).

    Attributes:
        source: the paper.
        table: where in it.
        setting: what the two runs differ in.
        one_sided_a: observed |A ∩ B| / |A|.
        one_sided_b: observed |A ∩ B| / |B|.
        random_a: the same by chance alone, without regard to matrices: the density of B.
        random_b: likewise, the density of A.
        sparsity_a: of the first run's update.
        sparsity_b: of the second's.
    """

    source: str
    table: str
    setting: str
    one_sided_a: float
    one_sided_b: float
    random_a: float
    random_b: float
    sparsity_a: float
    sparsity_b: float

    @property
    def lift(self) -> float:
        """Observed over chance; the same from either side, but for rounding."""
        return self.one_sided_a / self.random_a


@dataclass(frozen=True, slots=True)
class PublishedNumber:
    """Any other number, as printed; shares are fractions.

    Attributes:
        source: the paper.
        table: where in it.
        quantity: what was measured: `"rank"`, `"never"`, `"jaccard"`, …
        setting: of which model or run.
        value: the number; the lower end where there is an upper one.
        upper: the upper end of a range, else None.
        note: what to know before comparing with it.
        tolerance: under which entries count as updated; None where the source does not say, or
            where none is needed.
        dtype: of the weights, as torch names it; empty where the source does not say.
    """

    source: str
    table: str
    quantity: str
    setting: str
    value: float
    upper: float | None = None
    note: str = ""
    tolerance: Tolerance | None = None
    dtype: str = ""
