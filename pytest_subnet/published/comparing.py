"""A measured sparsity beside the nearest published ones."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pytest_subnet.published.selecting import comparable, nearest
from pytest_subnet.scan.tolerance import PAPER
from pytest_subnet.tables import table
from pytest_subnet.text import column, facts, percent, plural, safe, short_dtype

if TYPE_CHECKING:
    from pytest_subnet.published.rows import PublishedSparsity
    from pytest_subnet.scan.tolerance import Tolerance

_UNSAID = "not said"
_WIDTH = 85
_CAVEAT = (
    "learning rate, number of steps, batch size and optimiser move the number by tens of points; "
    "no row is a target"
)
_OTHER = "the tolerance alone moves the number by up to 30 points"


@dataclass(frozen=True, slots=True, repr=False)
class PublishedComparison:
    """A measured sparsity and the nearest published ones; none of them is a target.

    Attributes:
        sparsity: what was measured, fraction in [0, 1].
        tolerance: under which.
        dtype: on which dtype, as torch or as the field names it.
        algorithm: to which the published rows are limited; None takes all.
        nearest: the published rows, comparable ones first.
    """

    sparsity: float
    tolerance: Tolerance
    dtype: str
    algorithm: str | None
    nearest: tuple[PublishedSparsity, ...]

    @property
    def comparable(self) -> tuple[PublishedSparsity, ...]:
        """The rows that were measured under the same tolerance and on the same dtype."""
        return tuple(row for row in self.nearest if comparable(row, self.tolerance, self.dtype))

    def rows(self) -> list[dict[str, object]]:
        """The measured number first, then one row for each published one."""
        rows: list[dict[str, object]] = [
            {
                "source": "measured here",
                "algorithm": self.algorithm or "",
                "model": "",
                "tolerance": str(self.tolerance),
                "dtype": short_dtype(self.dtype),
                "sparsity": percent(self.sparsity),
                "density": percent(1 - self.sparsity),
                "note": "",
            }
        ]
        notes = self._notes()
        for row in self.nearest:
            rows.append(
                {
                    "source": f"{row.source}, {row.table}",
                    "algorithm": row.algorithm,
                    "model": row.tuned or (f"from {row.base}" if row.base else _UNSAID),
                    "tolerance": _UNSAID if row.tolerance is None else str(row.tolerance),
                    "dtype": short_dtype(row.dtype) or _UNSAID,
                    "sparsity": percent(row.sparsity),
                    "density": percent(row.density),
                    "note": f"[{notes.index(row.note) + 1}]" if row.note else "",
                }
            )
        return rows

    def table(self) -> str:
        """The rows as text, with what must be known before reading anything into them."""
        what = f" for {safe(self.algorithm)}" if self.algorithm else ""
        title = f"sparsity {percent(self.sparsity)} beside the nearest published numbers{what}"
        rows = table(self.rows(), right=["sparsity", "density"])
        return f"{title}\n\n{rows}\n\n{facts('before comparing', self._caveats())}"

    def _notes(self) -> list[str]:
        return list(dict.fromkeys(row.note for row in self.nearest if row.note))

    def _caveats(self) -> list[tuple[str, str]]:
        paragraphs = [("caveat", _CAVEAT)]
        other = len(self.nearest) - len(self.comparable)
        if other:
            measured = f"{self.tolerance}, {short_dtype(self.dtype)}"
            text = f"{other:,} of {plural(len(self.nearest), 'row')} not under {measured}: {_OTHER}"
            if self.tolerance != PAPER:
                text += "; 2505.11711 mostly gives atol=1e-5, as update_sparsity(pair, atol=1e-5)"
            paragraphs.append(("tolerance", text))
        paragraphs += [(f"[{number}]", note) for number, note in enumerate(self._notes(), 1)]
        return [
            row
            for label, paragraph in paragraphs
            for row in column(label, textwrap.wrap(paragraph, _WIDTH))
        ]

    def to_dict(self) -> dict[str, object]:
        """Plain JSON types."""
        return {
            "sparsity": self.sparsity,
            "tolerance": str(self.tolerance),
            "dtype": self.dtype,
            "algorithm": self.algorithm,
            "nearest": [
                {
                    "source": row.source,
                    "table": row.table,
                    "algorithm": row.algorithm,
                    "base": row.base,
                    "tuned": row.tuned,
                    "tolerance": None if row.tolerance is None else str(row.tolerance),
                    "dtype": row.dtype,
                    "sparsity": row.sparsity,
                    "comparable": comparable(row, self.tolerance, self.dtype),
                    "note": row.note,
                }
                for row in self.nearest
            ],
        }

    def __repr__(self) -> str:
        """One line: the number, and how many rows stand beside it."""
        return (
            f"PublishedComparison(sparsity={self.sparsity:.6g}, {self.tolerance}, "
            f"{len(self.nearest)} published, {len(self.comparable)} comparable)"
        )


def compare_published(
    sparsity: float,
    *,
    tolerance: Tolerance,
    dtype: str,
    algorithm: str | None = None,
    count: int = 5,
) -> PublishedComparison:
    """Put a measured sparsity beside the nearest published ones.

    Args:
        sparsity: fraction in [0, 1].
        tolerance: under which it was measured.
        dtype: on which dtype.
        algorithm: limits the published rows: `"GRPO"`, `"DPO"`, `"SFT"`, …; None takes all.
        count: how many published rows at most; at least one.

    Returns:
        The comparison; print its `.table()`.

    Raises:
        SelectionError: nothing is published by this algorithm.
        ValueError: `sparsity` is no fraction.

    >>> from pytest_subnet.scan import PAPER
    >>> compare_published(0.71, tolerance=PAPER, dtype="bfloat16", algorithm="GRPO")
    PublishedComparison(sparsity=0.71, atol=1e-05, 5 published, 4 comparable)
    """
    rows = nearest(sparsity, algorithm=algorithm, tolerance=tolerance, dtype=dtype, count=count)
    spelled = None if algorithm is None else rows[0].algorithm
    return PublishedComparison(sparsity, tolerance, dtype, spelled, rows)
