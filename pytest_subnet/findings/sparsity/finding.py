"""How much of the model did not move (arXiv 2505.11711, section 2.2 and Table 1)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from pytest_subnet.errors import SelectionError
from pytest_subnet.findings.common.bounds import (
    check_fraction,
    check_message,
    check_range,
    check_tolerance,
    warn_of_vacuous,
)
from pytest_subnet.findings.common.result import (
    Coverage,
    Message,
    Movement,
    cover,
    measure,
    reworded,
)
from pytest_subnet.findings.precision import expected_densities
from pytest_subnet.findings.sparsity.texts import identical, too_dense, too_sparse, uneven
from pytest_subnet.pairs.selection import select
from pytest_subnet.published.comparing import compare_published
from pytest_subnet.recording import record
from pytest_subnet.scan.gathering import ledger
from pytest_subnet.scan.tolerance import SAME_BITS
from pytest_subnet.tables import table
from pytest_subnet.text import facts, percent, plural

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pytest_subnet.pairs import ModelPair, Selection
    from pytest_subnet.pairs.selection import Patterns
    from pytest_subnet.published import PublishedComparison
    from pytest_subnet.scan.gathering import Ledger
    from pytest_subnet.scan.tolerance import Tolerance


@dataclass(frozen=True, slots=True, repr=False)
class UpdateSparsity:
    """The share of entries that did not change, and how it comes about.

    Attributes:
        coverage: pair, tolerance, dtype, tensors and entries measured.
        updated: entries updated under the tolerance.
        updated_under: the same for every tolerance that was gathered, by its name.
        zero_sign_flips: entries that are zero on both sides with another sign; with same bits they
            are among the updated ones.
        nonfinite: NaN and Inf in either checkpoint.
        per_tensor: the tensors measured, as `Movement`.
        apart: selected buffers and integer tensors, compared by bits and not part of the numbers.
        expected_sparsity: an estimate, also of each tensor in `per_tensor`: the sparsity that an
            unstructured update of the same energy would show after rounding to 16 bits (see
            docs/findings/precision.md). Tensors that are not rounded count as they were measured;
            None where none is, or where a wide `rtol` hides stored steps.
    """

    coverage: Coverage
    updated: int
    updated_under: dict[str, int]
    zero_sign_flips: int
    nonfinite: int
    per_tensor: tuple[Movement, ...]
    apart: tuple[Movement, ...]
    expected_sparsity: float | None = None

    @property
    def numel(self) -> int:
        """Entries measured."""
        return self.coverage.numel

    @property
    def sparsity(self) -> float:
        """1 - updated / entries, over all tensors together (not the mean of per-tensor values)."""
        return (self.numel - self.updated) / self.numel

    @property
    def density(self) -> float:
        """Share of entries updated: 1 - sparsity."""
        return self.updated / self.numel

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
        """Of the content of base and tuned; each is taken when it is asked for."""
        return self.coverage.fingerprints

    @property
    def nothing_moved(self) -> bool:
        """Whether no measured entry changed its value; a zero that changed its sign did not."""
        return self.updated_under[str(SAME_BITS)] == self.zero_sign_flips

    @property
    def matrices(self) -> tuple[Movement, ...]:
        """The tensors measured that have two or more dimensions."""
        return tuple(each for each in self.per_tensor if len(each.shape) > 1)

    @property
    def spread(self) -> float | None:
        """How far the furthest matrix is from the sparsity of all matrices together.

        None with fewer than two matrices.
        """
        distances = _distances(self.matrices)
        return max(distances) if len(distances) > 1 else None

    def rows(self) -> list[dict[str, object]]:
        """One row a tensor, for tables and reports."""
        return [
            {
                "tensor": each.name,
                "kind": each.kind,
                "layer": "" if each.layer is None else each.layer,
                "entries": f"{each.numel:,}",
                "updated": f"{each.updated:,}",
                "sparsity": percent(each.sparsity),
                "density": percent(each.density),
                "expected": _percent_or_nothing(each.expected_sparsity),
            }
            for each in self.per_tensor
        ]

    def table(self) -> str:
        """The rows as text, under a line that says what was measured."""
        numbers = ["layer", "entries", "updated", "sparsity", "density", "expected"]
        return f"{facts(repr(self), self.coverage.rows())}\n\n{table(self.rows(), right=numbers)}"

    def compare_published(
        self, *, algorithm: str | None = None, count: int = 5
    ) -> PublishedComparison:
        """Put the sparsity beside the nearest published ones; print the `.table()` of what comes.

        Rows under the same tolerance and dtype come first. None is a target: learning rate, steps,
        batch and optimiser move the number by tens of points.

        Args:
            algorithm: limits the rows: `"GRPO"`, `"DPO"`, `"SFT"`, …; None takes all.
            count: how many published rows at most; at least one.

        Raises:
            SelectionError: nothing is published by this algorithm.
            ValueError: `count` is below 1.

        >>> update_sparsity(pair, atol=1e-5).compare_published(algorithm="GRPO")
        PublishedComparison(sparsity=0.9375, atol=1e-05, 5 published, 4 comparable)
        """
        return compare_published(
            self.sparsity,
            tolerance=self.tolerance,
            dtype=self.dtype,
            algorithm=algorithm,
            count=count,
        )

    def to_dict(self) -> dict[str, object]:
        """Plain JSON types, for reports and baselines."""
        return {
            "finding": "update_sparsity",
            "sparsity": self.sparsity,
            "density": self.density,
            "expected_sparsity": self.expected_sparsity,
            "updated": self.updated,
            "zero_sign_flips": self.zero_sign_flips,
            "nonfinite": self.nonfinite,
            "updated_under": dict(self.updated_under),
            "spread": self.spread,
            **self.coverage.to_dict(),
        }

    def __repr__(self) -> str:
        """One line that reads well in a failed `assert`."""
        return (
            f"UpdateSparsity(sparsity={self.sparsity:.6g}, updated={self.updated:,} of "
            f"{self.numel:,}, {self.tolerance}, {self.dtype})"
        )


def update_sparsity(
    pair: ModelPair,
    *,
    include: Patterns | None = None,
    exclude: Patterns | None = None,
    kinds: Patterns | None = None,
    atol: float | None = None,
    rtol: float | None = None,
) -> UpdateSparsity:
    """Measure the share of entries that fine-tuning did not change.

    sparsity = 1 - updated / entries, over all selected tensors together. By default an entry is
    updated when base and tuned store other bits. Buffers and integer tensors stay apart.

    Args:
        pair: base and tuned, read in pieces; what was read before is not read again.
        include: glob or globs on base names; None takes all.
        exclude: glob or globs on base names to leave out.
        kinds: kind or kinds (`"q_proj"`, `"norm"`, …).
        atol: |tuned - base| <= atol counts as unchanged, in weight units; the paper's is 1e-5.
        rtol: |tuned - base| <= rtol * max(|base|, |tuned|) counts as unchanged.

    Returns:
        The counts, in all and per tensor.

    Raises:
        SelectionError: a pattern matches nothing, or only buffers and integer tensors are left.
        PairMismatchError: a selected tensor does not align.
        ValueError: both tolerances, or a negative one.

    Source: arXiv 2505.11711, section 2.2 (there atol=1e-5).

    >>> update_sparsity(pair)
    UpdateSparsity(sparsity=0.9375, updated=4 of 64, same bits, bf16)
    """
    tolerance = check_tolerance(atol, rtol)
    selection = select(pair, include, exclude, kinds)
    if not selection.rows:
        raise SelectionError(
            f"only buffers and integer tensors are selected ({len(selection.apart):,}), which "
            "sparsity leaves apart; assert_frozen and assert_updated compare them by bits"
        )
    result = _measured(pair, selection, tolerance)
    record(result)
    return result


def _measured(pair: ModelPair, selection: Selection, tolerance: Tolerance) -> UpdateSparsity:
    everything = measure(pair, (*selection.rows, *selection.apart), tolerance)
    tensors, apart = everything[: len(selection.rows)], everything[len(selection.rows) :]
    expected = expected_densities(pair, selection.rows, tolerance)
    tensors = tuple(
        each if density is None else each._replace(expected_sparsity=1 - density)
        for each, density in zip(tensors, expected, strict=True)
    )
    weights = sum(tensor.is_weight for tensor in pair.tensors)
    return UpdateSparsity(
        coverage=cover(pair, tensors, tolerance, total=weights),
        updated=sum(each.updated for each in tensors),
        updated_under=_under_each_tolerance(ledger(pair), selection.rows, tolerance),
        zero_sign_flips=sum(each.zero_sign_flips for each in tensors),
        nonfinite=sum(each.nonfinite for each in tensors),
        per_tensor=tensors,
        apart=apart,
        expected_sparsity=_expected(tensors),
    )


def _expected(tensors: tuple[Movement, ...]) -> float | None:
    """The estimate over all of them; those that are not rounded count as they were measured."""
    if all(each.expected_sparsity is None for each in tensors):
        return None
    shares = (
        each.sparsity if each.expected_sparsity is None else each.expected_sparsity
        for each in tensors
    )
    numel = sum(each.numel for each in tensors)
    return (
        math.fsum(share * each.numel for share, each in zip(shares, tensors, strict=True)) / numel
    )


def _percent_or_nothing(share: float | None) -> str:
    return "" if share is None else percent(share)


def _under_each_tolerance(
    known: Ledger, rows: tuple[int, ...], tolerance: Tolerance
) -> dict[str, int]:
    index = np.asarray(rows, np.intp)
    tolerances = dict.fromkeys((*known.declared, tolerance))
    return {
        str(each): int(known.updated(each)[index].sum())
        for each in tolerances
        if not known.missing(index, each).size  # declared after these tensors were read
    }


def _distances(tensors: tuple[Movement, ...]) -> list[float]:
    """How far the sparsity of each is from that of all together."""
    updated, numel = sum(each.updated for each in tensors), sum(each.numel for each in tensors)
    # Whole numbers up to the last division: 0.8 - 0.7 would be above 0.1.
    return [
        abs(each.updated * numel - updated * each.numel) / (each.numel * numel) for each in tensors
    ]


def assert_update_sparsity(
    pair: ModelPair,
    *,
    at_least: float | None = None,
    at_most: float | None = None,
    allow_identical: bool = False,
    include: Patterns | None = None,
    exclude: Patterns | None = None,
    kinds: Patterns | None = None,
    atol: float | None = None,
    rtol: float | None = None,
    message: Message | None = None,
) -> UpdateSparsity:
    """Fail unless the share of entries that did not change lies within the bounds.

    Fails too where nothing moved, whatever the bounds: a run that saved its base again would pass
    every sparsity gate.

    Valid usages:
        assert_update_sparsity(pair, at_least=0.70)               # an RL run, bf16, same bits
        assert_update_sparsity(pair, at_least=0.70, atol=1e-5)    # the paper's definition
        assert_update_sparsity(pair, at_most=0.99)                # it did train
        assert_update_sparsity(pair, at_least=0.7, exclude="*norm*")

    Args:
        pair: base and tuned.
        at_least: fraction in [0, 1]; this or `at_most` is required.
        at_most: fraction in [0, 1].
        allow_identical: accept a pair in which nothing moved.
        include: as in `update_sparsity`.
        exclude: as in `update_sparsity`.
        kinds: as in `update_sparsity`.
        atol: as in `update_sparsity`.
        rtol: as in `update_sparsity`.
        message: rewords a failure: takes the default text and gives the one to raise.

    Returns:
        What `update_sparsity` measured.

    Raises:
        AssertionError: a bound does not hold, or nothing moved.
        ValueError: no bound, a bound outside [0, 1], `at_least` above `at_most`, or two tolerances.
        SelectionError: as in `update_sparsity`.
        PairMismatchError: as in `update_sparsity`.

    Source: arXiv 2505.11711, section 2.2 and Table 1.

    >>> assert_update_sparsity(pair, at_least=0.70).updated
    4
    """
    __tracebackhide__ = True
    check_range(at_least, at_most)
    check_message(message)
    result = update_sparsity(
        pair, include=include, exclude=exclude, kinds=kinds, atol=atol, rtol=rtol
    )
    text = None
    if result.nothing_moved and not allow_identical:
        text = identical(result)
    elif at_least is not None and result.sparsity < at_least:
        text = too_dense(result, at_least)
    elif at_most is not None and result.sparsity > at_most:
        text = too_sparse(result, at_most)
    if text is not None:
        raise AssertionError(reworded(text, message))
    warn_of_vacuous("assert_update_sparsity", at_least=at_least, at_most=at_most)
    return result


def assert_even_sparsity(
    pair: ModelPair,
    *,
    max_spread: float,
    allow_identical: bool = False,
    include: Patterns | None = None,
    exclude: Patterns | None = None,
    kinds: Patterns | None = None,
    atol: float | None = None,
    rtol: float | None = None,
    message: Message | None = None,
) -> UpdateSparsity:
    """Fail unless every matrix is about as sparse as all matrices together.

    Covers the selected tensors of two and more dimensions; norms and biases have none.

    Valid usages:
        assert_even_sparsity(pair, max_spread=0.15)                       # the paper's Figure 3
        assert_even_sparsity(pair, max_spread=0.15, exclude="*embed*")

    Args:
        pair: base and tuned.
        max_spread: fraction in [0, 1]: the furthest a matrix may be from the pooled sparsity.
        allow_identical: accept a pair in which no matrix moved.
        include: as in `update_sparsity`.
        exclude: as in `update_sparsity`.
        kinds: as in `update_sparsity`.
        atol: as in `update_sparsity`.
        rtol: as in `update_sparsity`.
        message: rewords a failure.

    Returns:
        What `update_sparsity` measured of all selected tensors; `.spread` is the number judged.

    Raises:
        AssertionError: a matrix is further off, or no matrix moved.
        SelectionError: fewer than two matrices are selected; or as in `update_sparsity`.
        ValueError: `max_spread` outside [0, 1].

    Source: arXiv 2505.11711, section 4 and Figure 3.

    >>> assert_even_sparsity(pair, max_spread=0.10).sparsity
    0.9375
    """
    __tracebackhide__ = True
    check_fraction("max_spread", max_spread)
    check_message(message)
    result = update_sparsity(
        pair, include=include, exclude=exclude, kinds=kinds, atol=atol, rtol=rtol
    )
    matrices, spread = result.matrices, result.spread
    if spread is None:
        raise SelectionError(
            f"evenness compares matrices with each other, and {plural(len(matrices), 'tensor')} "
            f"of {len(result.per_tensor):,} selected {'has' if len(matrices) == 1 else 'have'} "
            "two or more dimensions"
        )
    text = None
    if not any(each.changed > each.zero_sign_flips for each in matrices) and not allow_identical:
        text = identical(result, "no matrix moved")
    elif spread > max_spread:
        distances = dict(zip(matrices, _distances(matrices), strict=True))
        text = uneven(result, sorted(matrices, key=lambda each: -distances[each]), max_spread)
    if text is not None:
        raise AssertionError(reworded(text, message))
    warn_of_vacuous("assert_even_sparsity", max_spread=max_spread)
    return result
