"""In how many directions each matrix moved (arXiv 2505.11711, Table 2)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from pytest_subnet.errors import SelectionError
from pytest_subnet.findings.common.bounds import check_fraction, check_message, warn_of_vacuous
from pytest_subnet.findings.common.fingerprints import of_pair
from pytest_subnet.findings.common.result import Message, reworded
from pytest_subnet.findings.matrices.updates import grids_of, read_update
from pytest_subnet.findings.matrices.work import choose_matrices, measure_matrices
from pytest_subnet.findings.rank.result import RankOfUpdate, UpdateRank
from pytest_subnet.findings.rank.texts import nothing_moved, only_rounding, too_low
from pytest_subnet.recording import record
from pytest_subnet.text import plural, safe

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from pytest_subnet.findings.matrices.spectra import Spectrum
    from pytest_subnet.findings.matrices.updates import Matrix
    from pytest_subnet.findings.rank.result import Null
    from pytest_subnet.pairs import ModelPair
    from pytest_subnet.pairs.selection import Patterns

FLOAT32_EPS = 2.0**-23
"""Of the tolerance, for every dtype: the paper's script ranks updates in float32."""

_TELLING = 4096
"""Entries from which on it tells something that all of them have short mantissas."""


def update_rank(
    pair: ModelPair,
    *,
    effective: bool = False,
    include: Patterns | None = None,
    exclude: Patterns | None = None,
    kinds: Patterns | None = None,
    null: Null = "rounding",
) -> UpdateRank:
    """Measure in how many directions each matrix moved.

    rank = singular values of tuned - base above σ1 · max(m, n) · eps(float32), counted exactly, for
    every selected weight of two dimensions, and for every matrix of one of three (fused experts,
    `experts[3]`). Vectors have no rank; convolutions are left out, and a note says how many.

    Args:
        pair: base and tuned; every matrix is read once, and ranked on the pair's device: one after
            the other, on a GPU those of one shape together (some 2 GB of its memory).
        effective: also the effective rank, which needs all singular values and takes longer.
        include: glob or globs on base names; None takes all.
        exclude: glob or globs on base names to leave out.
        kinds: kind or kinds (`"q_proj"`, `"down_proj"`, …).
        null: `"rounding"` also counts the resolved rank: the singular values above twice what
            rounding to a 16-bit dtype produces by itself, be it the dtype of the comparison or
            the one in which the tuned checkpoint is stored. None leaves it out.

    Returns:
        Rank, stable rank and resolved rank, in all and per matrix.

    Raises:
        SelectionError: a pattern matches nothing, no weight of two dimensions and no stack of these
            is selected, or one holds NaN or Inf, or is of a dtype without arithmetic (float8).
        PairMismatchError: a selected tensor does not align.
        CheckpointError: a side cannot be read, or changed since the pair was opened.
        ValueError: an unknown `null`.

    Source: arXiv 2505.11711, Table 2 (there `torch.linalg.matrix_rank`).

    >>> update_rank(pair, include="*up_proj*").rank
    1
    """
    _check_null(null)
    chosen = choose_matrices(pair, include, exclude, kinds, what="a rank")
    per_tensor = _measured(pair, chosen.matrices, effective=effective, null=null)
    result = UpdateRank(
        pair=pair.label,
        matrices_total=chosen.total,
        notes=(*chosen.notes, *_hidden_rounding(per_tensor)),
        null=null,
        per_tensor=per_tensor,
        fingerprints=of_pair(pair),
    )
    record(result)
    return result


def _check_null(null: Null) -> None:
    if null not in ("rounding", None):
        raise ValueError(f"null={null!r} is not one of 'rounding', None")


def _hidden_rounding(matrices: Sequence[RankOfUpdate]) -> list[str]:
    """Matrices so large that their float32 is bfloat16's by no accident."""
    found = [each for each in matrices if each.is_bfloat16 and each.numel >= _TELLING and each.rank]
    if not found:
        return []
    return [
        f"{plural(len(found), 'matrix')} stored as float32 hold values of bfloat16 alone: rounded "
        'before, and no null applies; as_dtype="bfloat16" applies it'
    ]


def _measured(
    pair: ModelPair, matrices: Sequence[Matrix], *, effective: bool, null: Null
) -> tuple[RankOfUpdate, ...]:
    """The matrices asked for; what was counted of them before answers for less, too."""

    def answers(known: RankOfUpdate, matrix: Matrix) -> bool:
        if effective and known.effective_rank is None:
            return False
        rounded = null is not None and bool(grids_of(pair.tensors[matrix.row]))
        return not rounded or known.resolved_rank is not None

    found = measure_matrices(pair, matrices, _Ranking(effective, null), answers=answers)
    return tuple(
        each._replace(
            resolved_rank=each.resolved_rank if null else None,
            floor=each.floor if null else None,
            effective_rank=each.effective_rank if effective else None,
        )
        for each in found
    )


@dataclass(frozen=True)
class _Ranking:
    """`MatrixWork` that ranks updates; on a GPU those of one shape together."""

    effective: bool
    null: Null
    title = "ranking"
    key = "rank"

    def measure(self, pair: ModelPair, matrix: Matrix) -> RankOfUpdate:
        """As `MatrixWork.measure`."""
        return _rank_of(pair, matrix, effective=self.effective, null=self.null)

    def measure_alike(self, pair: ModelPair, batch: Sequence[Matrix]) -> Sequence[RankOfUpdate]:
        """As `MeasuresAlike.measure_alike`."""
        return _ranks_of(pair, batch, effective=self.effective, null=self.null)


class _Read(NamedTuple):
    """What is known of an update before its singular values are.

    Attributes:
        floor: as in `UpdateMatrix`, of the update as it is stored.
        is_bfloat16: as in `UpdateMatrix`.
        shift: the update was multiplied by 2 to the power of it.
        norm: its Frobenius norm, after that.
    """

    floor: float | None
    is_bfloat16: bool
    shift: int
    norm: float


def _rank_of(pair: ModelPair, matrix: Matrix, *, effective: bool, null: Null) -> RankOfUpdate:
    from pytest_subnet.findings.matrices.spectra import Spectrum

    delta, read = _read(pair, matrix, null)
    spectrum = Spectrum(delta, all_values=effective)
    del delta
    return _counted(pair, matrix, read, spectrum, effective=effective)


def _ranks_of(
    pair: ModelPair, batch: Sequence[Matrix], *, effective: bool, null: Null
) -> tuple[RankOfUpdate, ...]:
    """The same of matrices of one shape, with their spectra made and asked together."""
    from pytest_subnet.findings.matrices.batched import settle, spectra_of

    deltas, reads = zip(*(_read(pair, matrix, null) for matrix in batch), strict=True)
    spectra = spectra_of(deltas, all_values=effective)
    del deltas
    limits = [_limits(*each) for each in zip(batch, reads, spectra, strict=True)]
    settle(spectra, [limit for limit, _ in limits])
    settle(spectra, [max(each) for each in limits])
    return tuple(
        _counted(pair, *each, effective=effective)
        for each in zip(batch, reads, spectra, strict=True)
    )


def _read(pair: ModelPair, matrix: Matrix, null: Null) -> tuple[torch.Tensor, _Read]:
    """The update, so scaled that its squares are within float64, and what is known of it."""
    from pytest_subnet.findings.matrices.spectra import frobenius_norm, scaled

    tensor = pair.tensors[matrix.row]
    delta, floor, is_bfloat16 = read_update(pair, matrix, grids=grids_of(tensor) if null else ())
    # Squares of float64 leave float64 on both ends: ranks are those of the update times 2^shift.
    delta, shift = scaled(delta)
    norm = frobenius_norm(delta)
    if not math.isfinite(norm):
        wide = str(delta.dtype).removeprefix("torch.")
        raise SelectionError(
            f"{safe(matrix.name(tensor))} holds NaN, Inf or changes beyond {wide} in {pair.label}, "
            "and has no singular values; leave it out with exclude="
        )
    return delta, _Read(floor, is_bfloat16, shift, norm)


def _limits(matrix: Matrix, read: _Read, spectrum: Spectrum) -> tuple[float, float]:
    """Above what singular values count: for the rank, and for the resolved one."""
    limit = spectrum.largest() * max(matrix.shape) * FLOAT32_EPS
    return limit, 0.0 if read.floor is None else 2 * math.ldexp(read.floor, read.shift)


def _counted(
    pair: ModelPair, matrix: Matrix, read: _Read, spectrum: Spectrum, *, effective: bool
) -> RankOfUpdate:
    from pytest_subnet.findings.matrices.spectra import effective_rank

    tensor = pair.tensors[matrix.row]
    largest = spectrum.largest()
    limit, noise = _limits(matrix, read, spectrum)
    rank = spectrum.count_above(limit)
    # What is below the tolerance is no rank, however quiet the rounding.
    resolved = rank if noise <= limit else spectrum.count_above(noise)
    return RankOfUpdate(
        name=matrix.name(tensor),
        shape=matrix.shape,
        dtype=tensor.dtype,
        layer=tensor.layer,
        kind=tensor.kind,
        rank=rank,
        max_rank=min(matrix.shape),
        stable_rank=(read.norm / largest) ** 2 if largest else 0.0,
        resolved_rank=None if read.floor is None else resolved,
        effective_rank=effective_rank(spectrum.values()) if effective else None,
        largest=largest * 2.0**-read.shift,
        floor=read.floor,
        is_bfloat16=read.is_bfloat16,
    )


def assert_update_rank(
    pair: ModelPair,
    *,
    at_least: float,
    null: Null = "rounding",
    include: Patterns | None = None,
    exclude: Patterns | None = None,
    kinds: Patterns | None = None,
    message: Message | None = None,
) -> UpdateRank:
    """Fail unless the matrices moved in nearly all of their directions, on average.

    Judges the mean of rank / min(m, n) over the matrices, each counting once. Storing in 16 bits
    adds noise of full rank to whatever was learnt. So on 16-bit pairs the bound must also hold for
    the singular values that stand out of this noise; float32 pairs are not rounded.

    Valid usages:
        assert_update_rank(pair, at_least=0.99)                     # float32: the paper's claim
        assert_update_rank(pair, at_least=0.99, null=None)          # the paper's bare number
        assert_update_rank(pair, at_least=0.10, kinds="q_proj")     # bf16: beyond rounding

    Args:
        pair: base and tuned.
        at_least: fraction in [0, 1].
        null: `"rounding"` asks that the singular values above twice the rounding floor reach the
            bound too; None takes the bare number.
        include: as in `update_rank`.
        exclude: as in `update_rank`.
        kinds: as in `update_rank`.
        message: rewords a failure.

    Returns:
        What `update_rank` measured.

    Raises:
        AssertionError: the bound does not hold, only rounding makes it hold, or no matrix moved.
        ValueError: `at_least` outside [0, 1], or an unknown `null`.
        SelectionError: as in `update_rank`.
        PairMismatchError: as in `update_rank`.

    Source: arXiv 2505.11711, Table 2; the null is ours.

    >>> assert_update_rank(pair, at_least=0.1, include="*up_proj*").resolved_rank
    1
    """
    __tracebackhide__ = True
    check_fraction("at_least", at_least)
    check_message(message)
    result = update_rank(pair, include=include, exclude=exclude, kinds=kinds, null=null)
    resolved = result.resolved_ratio
    text = None
    if result.nothing_moved:
        text = nothing_moved(result)
    elif result.ratio < at_least:
        text = too_low(result, at_least)
    elif resolved is not None and resolved < at_least:
        text = only_rounding(result, at_least)
    if text is not None:
        raise AssertionError(reworded(text, message))
    warn_of_vacuous("assert_update_rank", at_least=at_least)
    return result
