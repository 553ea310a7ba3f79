"""How structured a matrix is: the rank of its displacement (Sindhwani, Sainath and Kumar 2015)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeAlias

from pytest_subnet.checkpoints.dtypes import ARITHMETIC
from pytest_subnet.errors import SelectionError
from pytest_subnet.findings.common.bounds import check_message
from pytest_subnet.findings.common.fingerprints import of_pair
from pytest_subnet.findings.common.result import Message, reworded
from pytest_subnet.findings.displacement.operators import resolve_operator
from pytest_subnet.findings.displacement.result import DisplacementRank, DisplacementRanks
from pytest_subnet.findings.displacement.texts import nothing_to_see, too_high
from pytest_subnet.findings.matrices.low_rank import count_above
from pytest_subnet.findings.matrices.updates import side_blocks, update_blocks
from pytest_subnet.findings.matrices.work import choose_matrices, measure_matrices
from pytest_subnet.pairs.model_pair import ModelPair, check_pair
from pytest_subnet.recording import record
from pytest_subnet.text import plural, safe, spell_tensor

if TYPE_CHECKING:
    from collections.abc import Hashable

    import numpy as np
    import torch
    from numpy.typing import NDArray

    from pytest_subnet.findings.displacement.operators import Blocks, DisplacementOperator, Form
    from pytest_subnet.findings.matrices.updates import Matrix
    from pytest_subnet.pairs.selection import Patterns

Of: TypeAlias = Literal["base", "tuned", "update"]

_EXPECTED = 4
"""The rank that structured matrices usually have at most."""


def displacement(
    matrix: torch.Tensor | NDArray[np.floating],
    *,
    operator: str | DisplacementOperator = "toeplitz",
    form: Form = "sylvester",
) -> torch.Tensor:
    """Compute what a displacement operator makes of a matrix, without forming the operator.

    Args:
        matrix: `[m, n]` floats.
        operator: `"toeplitz"`, `"hankel"`, `"toeplitz+hankel"`, or a `DisplacementOperator`.
        form: `"sylvester"` for A M - M B, `"stein"` for M - A M B.

    Returns:
        `[m, n]`, float64 of float64 and float32 of all others.

    Raises:
        ValueError: no matrix, not of real floats, an unknown operator or form, or one of another
            size.
        TypeError: neither a tensor nor an array.

    Source: Kailath, Kung and Morf 1979; the operators of Sindhwani, Sainath and Kumar 2015.

    >>> displacement(torch.ones(3, 3)).int()
    tensor([[0, 0, 2],
            [0, 0, 2],
            [0, 0, 2]], dtype=torch.int32)
    """
    return resolve_operator(operator, form).displacement(_check_matrix(matrix), form)


def displacement_rank(
    matrix_or_pair: torch.Tensor | NDArray[np.floating] | ModelPair,
    *,
    operator: str | DisplacementOperator = "toeplitz",
    form: Form = "sylvester",
    of: Of = "tuned",
    include: Patterns | None = None,
    exclude: Patterns | None = None,
    kinds: Patterns | None = None,
) -> DisplacementRanks:
    """Measure how many numbers a row and a column it takes to write each matrix down.

    The rank of the displacement: 2 for a Toeplitz matrix, at most 4 for a product of two, and
    min(m, n) for one without structure. A singular value counts when it is above what rounding to
    the storage dtype produces by itself (`DisplacementRank.tolerance`).

    Args:
        matrix_or_pair: one matrix `[m, n]` of floats, or a pair, whose matrices are read one at a
            time and worked on where the pair's device is.
        operator: `"toeplitz"`, `"hankel"`, `"toeplitz+hankel"`, or a `DisplacementOperator`, which
            brings its nodes: `DisplacementOperator.cauchy(rows, columns)`.
        form: `"sylvester"` for the rank of A M - M B, `"stein"` for that of M - A M B.
        of: which matrices of a pair: `"base"`, `"tuned"`, or their difference, `"update"`.
        include: glob or globs on base names; None takes all.
        exclude: glob or globs on base names to leave out.
        kinds: kind or kinds (`"q_proj"`, `"down_proj"`, …).

    Returns:
        Rank, tolerance, compression and whether the operator is invertible, of each matrix.

    Raises:
        SelectionError: a pattern matches nothing, no matrix is selected, or one holds NaN, Inf or
            zeros alone, or is of a dtype without arithmetic.
        PairMismatchError: a selected tensor does not align.
        ValueError: an unknown operator, form or `of`, or an operator of another size.
        TypeError: neither a matrix nor a pair.

    Source: Sindhwani, Sainath and Kumar 2015 ("Structured Transforms for Small-Footprint Deep
    Learning"); the tolerance is ours.

    >>> ramp = torch.arange(8.0)
    >>> displacement_rank(ramp[:, None] - ramp[None, :])
    DisplacementRanks(rank=2 at most, 1 matrix, toeplitz, f32)
    """
    return _measure(matrix_or_pair, operator, form, of, (include, exclude, kinds), _EXPECTED)


def _measure(
    matrix_or_pair: torch.Tensor | NDArray[np.floating] | ModelPair,
    operator: str | DisplacementOperator,
    form: Form,
    of: Of,
    patterns: tuple[Patterns | None, Patterns | None, Patterns | None],
    expected: int,
) -> DisplacementRanks:
    if of not in ("base", "tuned", "update"):
        raise ValueError(f"of={safe(repr(of))} is not one of 'base', 'tuned', 'update'")
    resolved = resolve_operator(operator, form)
    if isinstance(matrix_or_pair, ModelPair):
        result = _measure_pair(matrix_or_pair, resolved, form, of, patterns, expected)
    else:
        if any(each is not None for each in patterns):
            raise ValueError("include, exclude and kinds choose among the matrices of a pair")
        result = _measure_matrix(matrix_or_pair, resolved, form, expected)
    record(result)
    return result


def _check_matrix(matrix: object) -> torch.Tensor:
    """The matrix as a tensor; raise for anything else."""
    import numpy as np
    import torch

    if isinstance(matrix, np.ndarray):
        matrix = torch.from_numpy(matrix)
    if not isinstance(matrix, torch.Tensor):
        check_pair(matrix)
        raise AssertionError("check_pair raises for whatever is no pair")
    if matrix.ndim != 2 or not matrix.numel():
        raise ValueError(f"a matrix has two dimensions, not shape {list(matrix.shape)}")
    if str(matrix.dtype).removeprefix("torch.") not in ARITHMETIC:
        raise ValueError(f"no displacement is known for {matrix.dtype}; cast it to a real float")
    return matrix.detach()


def _measure_matrix(
    source: object, operator: DisplacementOperator, form: Form, expected: int
) -> DisplacementRanks:
    matrix = _check_matrix(source)
    shape, dtype = (matrix.shape[0], matrix.shape[1]), str(matrix.dtype).removeprefix("torch.")
    named = _Named("matrix", shape, None, "other", dtype)
    blocks = partial(iter, (matrix,))
    return DisplacementRanks(
        pair=spell_tensor(dtype, shape),
        of="matrix",
        operator=operator.name,
        form=form,
        matrices_total=1,
        notes=(),
        per_tensor=(_rank_of(named, blocks, blocks, operator, form, expected),),
    )


def _measure_pair(
    pair: ModelPair,
    operator: DisplacementOperator,
    form: Form,
    of: Of,
    patterns: tuple[Patterns | None, Patterns | None, Patterns | None],
    expected: int,
) -> DisplacementRanks:
    chosen = choose_matrices(pair, *patterns, what="a displacement")
    return DisplacementRanks(
        pair=pair.label,
        of=of,
        operator=operator.name,
        form=form,
        matrices_total=chosen.total,
        notes=chosen.notes,
        per_tensor=measure_matrices(
            pair, chosen.matrices, _Displacing(operator, form, of, expected)
        ),
        fingerprints=of_pair(pair),
    )


@dataclass(frozen=True)
class _Displacing:
    """`MatrixWork` that ranks the displacement of matrices."""

    operator: DisplacementOperator
    form: Form
    of: Of
    expected: int
    title = "displacing"

    @property
    def key(self) -> Hashable:
        """As `MatrixWork.key`; the rank is exact whatever was expected."""
        return "displacement", self.operator, self.form, self.of

    def measure(self, pair: ModelPair, matrix: Matrix) -> DisplacementRank:
        """As `MatrixWork.measure`."""
        tensor = pair.tensors[matrix.row]
        named = _Named(matrix.name(tensor), matrix.shape, tensor.layer, tensor.kind, tensor.dtype)
        stored = partial(side_blocks, pair, matrix, "base" if self.of == "base" else "tuned")
        source = partial(update_blocks, pair, matrix) if self.of == "update" else stored
        try:
            return _rank_of(named, source, stored, self.operator, self.form, self.expected)
        except ValueError as error:
            raise ValueError(f"{safe(named.name)}: {error}") from None


class _Named(NamedTuple):
    """What a matrix is called and what it is for."""

    name: str
    shape: tuple[int, int]
    layer: int | None
    kind: str
    dtype: str


def _rank_of(
    named: _Named,
    source: Blocks,
    stored: Blocks,
    operator: DisplacementOperator,
    form: Form,
    expected: int,
) -> DisplacementRank:
    """The rank of one matrix, of which at no time more is in memory than its displacement.

    Args:
        named: what it is called.
        source: the matrix, some rows at a time.
        stored: likewise what was rounded to the storage dtype.
        operator: what is applied.
        form: how.
        expected: the rank that it may have.
    """
    shape = named.shape
    operator.check_shape(shape)
    spread = _norm(stored, named) / math.sqrt(math.prod(shape))
    if source is not stored:
        _norm(source, named)
    if not any(bool(block.any()) for block in source()):
        raise SelectionError(
            f"{safe(named.name)} holds zeros alone, and every displacement of it has rank 0"
        )
    moved = operator.displacement_of(source, shape, form)
    tolerance = _tolerance(named.dtype, spread * operator.noise(shape, form), shape)
    counted = count_above(moved, tolerance, expected=expected)
    return DisplacementRank(
        name=named.name,
        shape=shape,
        dtype=named.dtype,
        layer=named.layer,
        kind=named.kind,
        rank=counted.above,
        tolerance=tolerance,
        leading=counted.leading,
        method=counted.method,
        nullity=operator.nullity(shape, form),
    )


def _norm(blocks: Blocks, named: _Named) -> float:
    """The Frobenius norm; raise where it is no number."""
    from pytest_subnet.findings.matrices.spectra import frobenius_norm

    norm = math.hypot(*(frobenius_norm(block) for block in blocks()))
    if not math.isfinite(norm):
        raise SelectionError(f"{safe(named.name)} holds NaN or Inf and has no displacement rank")
    return norm


def _tolerance(dtype: str, spread: float, shape: tuple[int, int]) -> float:
    """What rounding adds to a displacement at most: the norm of independent noise.

    Rounding is off by u / √3 of an entry at the root mean square, for half a step u; (√m + √n)
    times the noise of an entry is the largest singular value to expect, and what is measured of
    16-bit floats is 0.74 of that. Wider floats hold what arithmetic left: as for any rank, as many
    roundings as a row or column is long.

    Args:
        dtype: in which the matrix is stored.
        spread: root mean square of the matrix, times what its displacement does to noise.
        shape: `(m, n)`.
    """
    import torch

    half = torch.finfo(getattr(torch, dtype)).eps / 2
    noise = half / math.sqrt(3) * spread * (math.sqrt(shape[0]) + math.sqrt(shape[1]))
    return noise if dtype in ("bfloat16", "float16") else noise * max(shape)


def assert_displacement_rank(
    matrix_or_pair: torch.Tensor | NDArray[np.floating] | ModelPair,
    *,
    max_rank: int,
    operator: str | DisplacementOperator = "toeplitz",
    form: Form = "sylvester",
    of: Of = "tuned",
    include: Patterns | None = None,
    exclude: Patterns | None = None,
    kinds: Patterns | None = None,
    message: Message | None = None,
) -> DisplacementRanks:
    """Fail unless every matrix has a displacement of at most this rank.

    Valid usages:
        assert_displacement_rank(matrix, max_rank=2)                        # it is Toeplitz
        assert_displacement_rank(pair, max_rank=4, include="*structured*")  # training kept it so
        assert_displacement_rank(matrix, max_rank=1,
                                 operator=DisplacementOperator.cauchy(rows, columns))

    Args:
        matrix_or_pair: as in `displacement_rank`.
        max_rank: at least 1; where it is min(m, n) of a matrix or more, nothing could fail.
        operator: as in `displacement_rank`.
        form: as in `displacement_rank`.
        of: as in `displacement_rank`.
        include: as in `displacement_rank`.
        exclude: as in `displacement_rank`.
        kinds: as in `displacement_rank`.
        message: rewords a failure.

    Returns:
        What `displacement_rank` measured.

    Raises:
        AssertionError: the displacement of a matrix has a higher rank; or, of an update, none has
            any, because nothing moved further than rounding.
        ValueError: `max_rank` below 1, or so high that a matrix could not fail; or as in
            `displacement_rank`.
        TypeError: `max_rank` is no integer; or as in `displacement_rank`.
        SelectionError: as in `displacement_rank`.
        PairMismatchError: as in `displacement_rank`.

    Source: as `displacement_rank`.

    >>> ramp = torch.arange(8.0)
    >>> assert_displacement_rank(ramp[:, None] - ramp[None, :], max_rank=2).rank
    2
    """
    __tracebackhide__ = True
    if isinstance(max_rank, bool) or not isinstance(max_rank, int):
        raise TypeError(f"max_rank={safe(repr(max_rank))} is not an integer")
    if max_rank < 1:
        raise ValueError(f"max_rank={max_rank} is below 1, and only zeros have rank 0")
    check_message(message)
    patterns = (include, exclude, kinds)
    result = _measure(matrix_or_pair, operator, form, of, patterns, max_rank)
    empty = [each for each in result.per_tensor if max_rank >= each.max_rank]
    if empty:
        least = min(empty, key=lambda each: each.max_rank)
        raise ValueError(
            f"max_rank={max_rank} could not fail for {plural(len(empty), 'matrix')}, such as "
            f"{safe(least.name)} of {min(least.shape)} rows or columns; give a lower one, or leave "
            "them out with exclude="
        )
    if result.rank > max_rank:
        raise AssertionError(reworded(too_high(result, max_rank), message))
    if result.of == "update" and not result.rank:
        raise AssertionError(reworded(nothing_to_see(result), message))
    return result
