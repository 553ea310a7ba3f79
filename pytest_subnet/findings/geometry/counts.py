"""What is counted of the update of one matrix, and what chance and rounding make of the counts."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from pytest_subnet.errors import SelectionError
from pytest_subnet.findings.common.chance import Chance, by_rows_and_columns, by_strata, pooled
from pytest_subnet.findings.geometry.masks import (
    low_magnitude_bits,
    principal_bits,
    row_blocks,
    words_of,
)
from pytest_subnet.findings.matrices.base_cache import remembered
from pytest_subnet.findings.matrices.fused import WHOLE, parts_of
from pytest_subnet.findings.matrices.updates import read_side
from pytest_subnet.findings.rank.rounding import densities, gaps_around, solve_step_sizes
from pytest_subnet.masks.bits import unpack
from pytest_subnet.scan.found import STRATA, rounded_to, stratum_of
from pytest_subnet.scan.updated_entries import updated_entries
from pytest_subnet.text import safe

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterator, Sequence

    import torch
    from numpy.typing import NDArray

    from pytest_subnet.findings.matrices.fused import Part
    from pytest_subnet.findings.matrices.updates import Matrix
    from pytest_subnet.pairs import ModelPair
    from pytest_subnet.pairs.model_pair import TensorPair
    from pytest_subnet.scan.tolerance import Tolerance

MASKS = ("principal", "low_magnitude")
"""The masks that an update is held against."""


def parts_in(pair: ModelPair, matrix: Matrix) -> tuple[Part, ...] | None:
    """The matrices that one is made of; None where it is fused and nobody says how."""
    if matrix.at is not None:
        return (WHOLE,)
    return parts_of(pair.tensors[matrix.row].name, matrix.shape, pair.base.config)


def part_name(tensor: TensorPair, matrix: Matrix, part: Part) -> str:
    """What a part is called: `c_attn.weight[q]`; as the matrix where it is all of it."""
    return f"{matrix.name(tensor)}{f'[{part.name}]' if part.name else ''}"


class MatrixCounts(NamedTuple):
    """What was counted of one matrix, or of one part of a fused one.

    Attributes:
        name: its name in the base; `experts[3]` in a stack, `c_attn.weight[q]` of a fused one.
        shape: `(m, n)`.
        dtype: in which it was compared.
        layer: the number of its block; None outside the blocks.
        kind: what it is for.
        population: int64 `[strata]`, entries by exponent of the base weight and whether its
            mantissa is zero, without strata that do not occur; all of them, where it is not stored
            in 16 bits.
        updated: int64 `[strata]`, those that are updated.
        members: int64 `[masks, strata]`, those in each of `MASKS`.
        both: int64 `[masks]`, updated entries in each of them.
        products: sums of (updated entries) · (entries in the mask) over the rows, and over the
            columns, for each of `MASKS`; None for a single row or column.
        visible: float64 `[strata]`, which share of each an unstructured update of the same energy
            changes after rounding; None where nothing is rounded or it cannot be known.
        by_exponent: whether the strata are exponents.
    """

    name: str
    shape: tuple[int, int]
    dtype: str
    layer: int | None
    kind: str
    population: NDArray[np.int64]
    updated: NDArray[np.int64]
    members: NDArray[np.int64]
    both: NDArray[np.int64]
    products: tuple[tuple[int, int], ...] | None
    visible: NDArray[np.float64] | None
    by_exponent: bool

    @property
    def numel(self) -> int:
        """Its entries."""
        return math.prod(self.shape)

    def by_rounding(self, mask: int) -> float | None:
        """How many updated entries rounding would have put into a mask, of as many in all."""
        if self.visible is None:
            return None
        everywhere = float(self.population @ self.visible)
        inside = float(self.members[mask] @ self.visible)
        return int(self.updated.sum()) * inside / everywhere if everywhere else 0.0


@dataclass(frozen=True)
class CountUpdate:
    """`MatrixWork` that counts where the update of a matrix lies, in each of its parts."""

    fraction: float
    rank: int
    tolerance: Tolerance
    title = "update geometry"

    @property
    def key(self) -> Hashable:
        """As `MatrixWork.key`."""
        return "geometry", self.fraction, self.rank, self.tolerance

    def measure(self, pair: ModelPair, matrix: Matrix) -> tuple[MatrixCounts, ...]:
        """As `MatrixWork.measure`."""
        parts = parts_in(pair, matrix) or (WHOLE,)
        return tuple(self._measure(pair, matrix, part) for part in parts)

    def _measure(self, pair: ModelPair, matrix: Matrix, part: Part) -> MatrixCounts:
        tensor, shape = pair.tensors[matrix.row], part.shape(matrix.shape)
        name = part_name(tensor, matrix, part)
        base = part.of(read_side(pair, matrix, "base"))
        _check_values(base, name, pair.label)
        bits = _masks_of(pair, matrix, part, base, self.fraction, self.rank)
        size = STRATA.get(_strata_of(tensor) or "", 1)
        counts = _Counting(shape, size)
        for rows, tuned in _tuned_rows(pair, matrix, part, base.dtype):
            if not bool(tuned.isfinite().all()):
                raise _not_finite(name, pair.label)
            counts.add(rows, base[rows], tuned.to(base.device), bits, tensor, self.tolerance)
        kind = f"{part.name}_proj" if part.name else tensor.kind
        return self._counted(tensor, counts, name, shape, kind)

    def _counted(
        self, tensor: TensorPair, counts: _Counting, name: str, shape: tuple[int, int], kind: str
    ) -> MatrixCounts:
        used = counts.population > 0
        visible = _visible(tensor, counts, self.tolerance)
        one_line = 1 in shape  # keeping how full each column of one row is keeps every bit
        return MatrixCounts(
            name=name,
            shape=shape,
            dtype=tensor.dtype,
            layer=tensor.layer,
            kind=kind,
            population=counts.population[used],
            updated=counts.updated[used],
            members=counts.members[:, used],
            both=counts.both,
            products=None if one_line else counts.products(),
            visible=None if visible is None else visible[used],
            by_exponent=_strata_of(tensor) is not None,
        )


def _masks_of(
    pair: ModelPair, matrix: Matrix, part: Part, base: torch.Tensor, fraction: float, rank: int
) -> tuple[NDArray[np.uint8], ...]:
    """The bits of `MASKS`; the principal ones, which take a decomposition, are remembered."""
    import torch

    def make() -> tuple[torch.Tensor]:
        return (torch.from_numpy(principal_bits(base, fraction, rank)),)

    what = ("principal", fraction, rank, *([part] if part.name else []))
    (principal,) = remembered(pair, matrix, what, make)
    return principal.numpy(), low_magnitude_bits(base, fraction)


class _Counting:
    """The counts of one matrix as its rows come in."""

    def __init__(self, shape: tuple[int, int], strata: int) -> None:
        self._columns = shape[1]
        self._strata = strata
        self.population = np.zeros(strata, np.int64)
        self.updated = np.zeros(strata, np.int64)
        self.members = np.zeros((len(MASKS), strata), np.int64)
        self.both = np.zeros(len(MASKS), np.int64)
        self.energy = 0.0
        self._by_row: list[NDArray[np.int64]] = []
        self._by_column = np.zeros((1 + len(MASKS), shape[1]), np.int64)

    def add(
        self,
        rows: slice,
        base: torch.Tensor,
        tuned: torch.Tensor,
        bits: Sequence[NDArray[np.uint8]],
        tensor: TensorPair,
        tolerance: Tolerance,
    ) -> None:
        """Count some rows; they start at a whole byte of `bits`."""
        first, numel = rows.start * self._columns, base.numel()
        (updated,) = updated_entries(
            words_of(base).view(np.uint8), words_of(tuned).view(np.uint8), tensor.dtype, [tolerance]
        )
        masks = [unpack(each[first // 8 :], numel) for each in bits]
        stratum = self._stratum(base, tensor)
        self.population += np.bincount(stratum, minlength=self._strata)
        self.updated += np.bincount(stratum[updated], minlength=self._strata)
        for number, mask in enumerate(masks):
            self.members[number] += np.bincount(stratum[mask], minlength=self._strata)
            self.both[number] += np.count_nonzero(updated & mask)
        self.energy += float((tuned.double() - base.double()).square_().sum())
        marked = np.stack([updated, *masks]).reshape(1 + len(MASKS), -1, self._columns)
        self._by_row.append(marked.sum(axis=2, dtype=np.int64))
        self._by_column += marked.sum(axis=1, dtype=np.int64)

    def _stratum(self, base: torch.Tensor, tensor: TensorPair) -> NDArray[np.intp]:
        stored = _strata_of(tensor)
        if stored is None:
            return np.zeros(base.numel(), np.intp)
        import torch

        words: NDArray[np.uint16] = words_of(base.to(getattr(torch, stored))).view(np.uint16)
        return stratum_of(words, self._strata)

    def products(self) -> tuple[tuple[int, int], ...]:
        """As `MatrixCounts.products`."""
        rows, columns = np.concatenate(self._by_row, axis=1), self._by_column
        return tuple(
            (int(rows[0] @ rows[each]), int(columns[0] @ columns[each]))
            for each in range(1, 1 + len(MASKS))
        )


def _tuned_rows(
    pair: ModelPair, matrix: Matrix, part: Part, dtype: torch.dtype
) -> Iterator[tuple[slice, torch.Tensor]]:
    if matrix.at is not None or part.name:  # a stack is read a matrix at a time, a fused one whole
        whole = part.of(read_side(pair, matrix, "tuned"))
        for rows in row_blocks(part.shape(matrix.shape)):
            yield rows, whole[rows]
        return
    name = pair.tensors[matrix.row].tuned_name
    for rows in row_blocks(matrix.shape):
        yield rows, pair.tuned.read(name, rows).to(dtype)


def _strata_of(tensor: TensorPair) -> str | None:
    """Of which dtype the exponents of its base weights are; None where it is not of 16 bits."""
    return tensor.dtype if tensor.dtype in STRATA else _grid(tensor)


def _grid(tensor: TensorPair) -> str | None:
    """The 16-bit dtype of which the base was when its update was rounded to it."""
    stored = tensor.base_dtype
    on_grid = stored in STRATA and rounded_to(tensor.dtype, tensor.tuned_dtype) == stored
    return stored if on_grid else None


def _check_values(base: torch.Tensor, name: str, label: str) -> None:
    blocks = [base[rows] for rows in row_blocks((base.shape[0], base.shape[1]))]
    if not all(bool(each.isfinite().all()) for each in blocks):
        raise _not_finite(name, label)
    if not any(bool(each.any()) for each in blocks):
        raise SelectionError(
            f"{safe(name)} of {label} holds zeros alone in the base, of which none "
            "is principal or small; leave it out with exclude="
        )


def _not_finite(name: str, label: str) -> SelectionError:
    return SelectionError(
        f"{safe(name)} of {label} holds NaN or Inf, and its update has no geometry; "
        "leave it out with exclude="
    )


def _visible(
    tensor: TensorPair, counts: _Counting, tolerance: Tolerance
) -> NDArray[np.float64] | None:
    """Which share of each stratum an unstructured update of the observed energy changes.

    The gaps around a weight depend on its stratum alone, so that one weight stands for all of it.
    """
    dtype = _grid(tensor)
    if dtype is None or not counts.energy:
        return None
    mantissa = 0x8000 // (STRATA[dtype] // 2)
    if tolerance.rtol is not None and tolerance.rtol >= 0.5 / mantissa:  # hides stored steps
        return None
    strata = np.arange(STRATA[dtype])
    words = (strata // 2 * mantissa + 1 - strata % 2).astype(np.uint16)
    gaps = gaps_around(words, [1] * strata.size, dtype)
    around = (counts.population @ gaps)[None]
    energy = np.array([counts.energy / int(counts.population.sum())])
    (step,) = solve_step_sizes(around, energy, np.zeros(1, np.intp))
    return densities(gaps, np.full(strata.size, step), strata, tolerance.atol or 0.0)


def chance_of(null: str, matrices: Sequence[MatrixCounts], mask: int) -> Chance:
    """What a null of `mask_overlap` expects of the update in one of `MASKS`."""
    numel = np.array([each.numel for each in matrices], np.int64)
    updated = np.array([each.updated.sum() for each in matrices], np.int64)
    members = np.array([each.members[mask].sum() for each in matrices], np.int64)
    if null == "pooled":
        return pooled(numel, updated, members)
    if null == "matrix":
        owner = np.arange(len(matrices))
        return by_strata(numel, updated, members, owner=owner, tensors=len(matrices))
    if null == "rowcol":
        products = [None if each.products is None else each.products[mask] for each in matrices]
        return by_rows_and_columns(numel, updated, members, products=products)
    return by_strata(
        np.concatenate([each.population for each in matrices]),
        np.concatenate([each.updated for each in matrices]),
        np.concatenate([each.members[mask] for each in matrices]),
        owner=np.repeat(np.arange(len(matrices)), [each.population.size for each in matrices]),
        tensors=len(matrices),
    )
