"""Choosing among published numbers."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from pytest_subnet.errors import SelectionError
from pytest_subnet.published.numbers import NUMBERS
from pytest_subnet.published.sparsities import SPARSITIES
from pytest_subnet.scan.tolerance import SAME_BITS, Tolerance
from pytest_subnet.text import nearest as nearest_word
from pytest_subnet.text import safe, short_dtype

if TYPE_CHECKING:
    from collections.abc import Iterable

    from pytest_subnet.published.rows import PublishedNumber, PublishedSparsity

_BF16_GAP = 2.0**-8
"""Two bfloat16 values that differ, differ by at least this share of the larger one."""


def published_sparsities(
    *, algorithm: str | None = None, source: str | None = None
) -> tuple[PublishedSparsity, ...]:
    """The published sparsities of updates.

    Args:
        algorithm: `"GRPO"`, `"DPO"`, `"SFT"`, …, in any case; None takes all.
        source: a paper by its number, `"2505.11711"`; None takes all.

    Returns:
        The rows in the order of the papers.

    Raises:
        SelectionError: nothing is published by this algorithm, or in this source.

    >>> rows = published_sparsities(algorithm="PRIME")
    >>> [(row.table, str(row.tolerance), row.sparsity) for row in rows][:2]
    [('Table 1', 'atol=1e-05', 0.77), ('Table 6', 'atol=1e-08', 0.7526)]
    """
    names = {row.algorithm.lower(): row.algorithm for row in SPARSITIES}
    wanted = _known("algorithm", algorithm, names)
    paper = _known("source", _number(source), {_number(row.source): "" for row in SPARSITIES})
    return tuple(
        row
        for row in SPARSITIES
        if (wanted is None or row.algorithm.lower() == wanted)
        and (paper is None or _number(row.source) == paper)
    )


def published_numbers(
    *, quantity: str | None = None, source: str | None = None
) -> tuple[PublishedNumber, ...]:
    """The published numbers that are no sparsity of a pair: ranks, scores, dynamics.

    Args:
        quantity: `"rank"`, `"never"`, `"step sparsity"`, …; None takes all.
        source: a paper by its number; None takes all.

    Returns:
        The rows, as printed.

    Raises:
        SelectionError: no such quantity, or nothing in this source.

    >>> [row.value for row in published_numbers(quantity="rank")]
    [0.998, 0.995, 0.992, 0.994]
    """
    wanted = _known("quantity", quantity, {row.quantity.lower(): row.quantity for row in NUMBERS})
    paper = _known("source", _number(source), {_number(row.source): "" for row in NUMBERS})
    return tuple(
        row
        for row in NUMBERS
        if (wanted is None or row.quantity.lower() == wanted)
        and (paper is None or _number(row.source) == paper)
    )


def nearest(
    sparsity: float,
    *,
    algorithm: str | None = None,
    tolerance: Tolerance = SAME_BITS,
    dtype: str = "bfloat16",
    count: int = 3,
) -> tuple[PublishedSparsity, ...]:
    """The published sparsities closest to a number: comparable ones first, one row a model.

    Of a model that was published under several tolerances the row under the one closest to
    `tolerance` is taken.

    Args:
        sparsity: fraction in [0, 1].
        algorithm: as in `published_sparsities`.
        tolerance: under which `sparsity` was measured.
        dtype: of the weights it was measured on.
        count: how many rows at most; at least one.

    Returns:
        Rows under a comparable tolerance, nearest first, then the others, nearest first.

    Raises:
        SelectionError: nothing is published by this algorithm.
        ValueError: `sparsity` is no fraction, or `count` is below 1.

    >>> from pytest_subnet.scan import PAPER
    >>> [row.tuned for row in nearest(0.77, algorithm="PPO", tolerance=PAPER)]
    ['peiyi9979/math-shepherd-mistral-7b-rl']
    """
    if not 0 <= sparsity <= 1:
        raise ValueError(f"sparsity={sparsity!r} is not a fraction in [0, 1]")
    if type(count) is not int:
        raise TypeError(f"count={count!r} is no whole number")
    if count < 1:
        raise ValueError(f"count={count!r} is not a number of at least 1")
    best: dict[tuple[str, ...], PublishedSparsity] = {}
    for row in sorted(
        published_sparsities(algorithm=algorithm),
        # Of equals the one with more digits: Table 6 before Table 1.
        key=lambda row: (_apart(row, tolerance, dtype), row.table == "Table 1"),
    ):
        model = row.source, row.algorithm, row.base, row.tuned
        best.setdefault((*model, "" if row.tuned else row.note), row)
    in_order = sorted(
        best.values(),
        key=lambda row: (not comparable(row, tolerance, dtype), abs(row.sparsity - sparsity)),
    )
    return tuple(in_order[:count])


def comparable(row: PublishedSparsity, tolerance: Tolerance, dtype: str) -> bool:
    """Whether `row` was measured as a number under `tolerance` on `dtype` was.

    Same bits and a small relative tolerance are one thing in bfloat16, but for the sign of zero.
    """
    return (
        row.tolerance is not None
        and short_dtype(row.dtype) == short_dtype(dtype)
        and _spelled(row.tolerance, row.dtype) == _spelled(tolerance, dtype)
    )


def _spelled(tolerance: Tolerance, dtype: str) -> Tolerance:
    small = tolerance.rtol is not None and tolerance.rtol < _BF16_GAP
    return SAME_BITS if small and short_dtype(dtype) == "bf16" else tolerance


def _apart(row: PublishedSparsity, tolerance: Tolerance, dtype: str) -> float:
    """How far apart two tolerances are, in powers of ten."""
    if comparable(row, tolerance, dtype):
        return 0.0
    if row.tolerance is None:
        return math.inf
    return abs(_power(row.tolerance, row.dtype) - _power(tolerance, dtype)) + 1


def _power(tolerance: Tolerance, dtype: str) -> float:
    limit = _spelled(tolerance, dtype).atol
    return math.log10(limit) if limit else -9.0  # below the smallest that was published


def _number(source: str | None) -> str | None:
    if source is not None and not isinstance(source, str):
        raise TypeError(f"source takes a paper's number as text, not {type(source).__name__}")
    return None if source is None else source.lower().removeprefix("arxiv").strip(" :")


def _known(keyword: str, asked: str | None, names: Iterable[str | None]) -> str | None:
    """`asked` in lower case; `SelectionError` when it is none of `names`."""
    if asked is None:
        return None
    if not isinstance(asked, str):
        raise TypeError(f"{keyword} takes a name, not {type(asked).__name__}")
    known = sorted(str(name) for name in names)
    if asked.lower() not in known:
        raise SelectionError(
            f"nothing is published here for {keyword}='{safe(asked)}'"
            f"{nearest_word(asked.lower(), known)}; there is {', '.join(known)}"
        )
    return asked.lower()
