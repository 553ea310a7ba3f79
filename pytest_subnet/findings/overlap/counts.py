"""What is counted of two masks, and what each null makes of the counts."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import numpy as np

from pytest_subnet.errors import CheckpointError
from pytest_subnet.findings.common.chance import Chance, by_rows_and_columns, by_strata, pooled
from pytest_subnet.masks.bits import popcount
from pytest_subnet.masks.marginals import marginals
from pytest_subnet.pairs.kinds import kind_of, layer_of
from pytest_subnet.scan.engines import cores
from pytest_subnet.scan.found import STRATA
from pytest_subnet.text import first_few, plural, safe

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from pytest_subnet.findings.overlap.masks import Masks
    from pytest_subnet.masks.update_mask import UpdateMask

CountT = TypeVar("CountT")

_WORTH_THREADS = 1 << 24
"""Entries; below, starting threads takes longer than they save."""


class Row(NamedTuple):
    """One tensor of both masks, and how many entries are in each and in both."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    layer: int | None
    kind: str
    numel: int
    count_a: int
    count_b: int
    intersection: int


def count_rows(masks: Masks) -> tuple[Row, ...]:
    """Count every selected tensor; reads each bit of both masks once."""
    rows = []
    for name, both in zip(masks.names, _intersections(masks), strict=True):
        a, b = masks.a.info(name), masks.b.info(name)
        if not max(0, a.entries + b.entries - a.numel) <= both <= min(a.entries, b.entries):
            raise CheckpointError(
                f"{masks.label}: {safe(name)} has {both:,} entries in both, which the "
                f"{a.entries:,} and {b.entries:,} of {a.numel:,} that the masks state do not "
                "allow; make the masks again"
            )
        layer, kind = layer_of(name), kind_of(name)
        counts = (a.numel, a.entries, b.entries, both)
        rows.append(Row(name, a.shape, masks.dtype(name), layer, kind, *counts))
    return tuple(rows)


def _intersections(masks: Masks) -> list[int]:
    """How many entries are in both masks, for each selected tensor."""

    def count(name: str) -> int:
        runs = zip(masks.a.words(name), masks.b.words(name), strict=True)
        return sum(popcount(x & y) for x, y in runs)

    return _of_each_tensor(masks, count)


def _of_each_tensor(masks: Masks, count: Callable[[str], CountT]) -> list[CountT]:
    entries = sum(masks.a.info(name).numel for name in masks.names)
    if entries < _WORTH_THREADS:
        return [count(name) for name in masks.names]
    with ThreadPoolExecutor(cores()) as pool:  # reading and counting release the interpreter
        return list(pool.map(count, masks.names))


def columns(rows: Sequence[Row]) -> tuple[NDArray[np.int64], ...]:
    """Entries, those in a, in b and in both: int64 `[tensors]` each."""
    counts = [(row.numel, row.count_a, row.count_b, row.intersection) for row in rows]
    return tuple(np.array(counts, np.int64).reshape(-1, 4).T.copy())


def chance_of(null: str, masks: Masks, rows: Sequence[Row]) -> Chance:
    """What a null expects; `"exponent"` only where `no_exponents` finds no obstacle."""
    numel, a, b, _ = columns(rows)
    if null == "pooled":
        return pooled(numel, a, b)
    if null == "matrix":
        return by_strata(numel, a, b, owner=np.arange(len(rows)), tensors=len(rows))
    if null == "rowcol":
        products = _of_each_tensor(masks, partial(_marginal_products, masks))
        return by_rows_and_columns(numel, a, b, products=products)
    return _by_exponent(masks, rows)


def no_exponents(masks: Masks) -> str | None:
    """Why the exponent null cannot be had for these masks; None if it can."""
    sixteen = [name for name in masks.names if masks.dtype(name) in STRATA]
    if not sixteen:
        dtypes = ", ".join(dict.fromkeys(masks.dtype(name) for name in masks.names))
        return f"it is for weights in 16-bit storage, and these are {dtypes}"
    for side, mask in (("a", masks.a), ("b", masks.b)):
        lacking = [name for name in sixteen if mask.strata(name) is None]
        if lacking:
            return (
                f"mask {side} carries no counts by exponent of the base weight for "
                f"{plural(len(lacking), 'tensor')} ({first_few(lacking)})"
            )
        for name in sixteen:
            _check_strata(mask, name)
    other = [name for name in sixteen if not _same_population(masks, name)]
    if other:
        return (
            "they are masks over different bases, whose weights have other exponents in "
            f"{plural(len(other), 'tensor')} ({first_few(other)})"
        )
    if masks.one_base:
        return None
    bases = masks.a.origin.base, masks.b.origin.base  # after the rest: it may read a checkpoint
    if "" in bases:
        unknown = " and ".join(s for s, base in zip("ab", bases, strict=True) if not base)
        return f"the base of mask {unknown} is not known"
    if bases[0] != bases[1]:
        return f"they are masks over different bases ({safe(bases[0])} and {safe(bases[1])})"
    return None


def _by_exponent(masks: Masks, rows: Sequence[Row]) -> Chance:
    """Strata by exponent in 16-bit tensors; any other tensor is one stratum."""
    counts, owner = [], []
    for index, row in enumerate(rows):
        a, b = masks.a.strata(row.name), masks.b.strata(row.name)
        if row.dtype in STRATA and a is not None and b is not None:
            of_row = np.stack([a.population, a.members, b.members])
            of_row = of_row[:, a.population > 0]  # of 512 strata, weights fall into some 60
        else:
            of_row = np.array([[row.numel], [row.count_a], [row.count_b]], np.int64)
        counts.append(of_row)
        owner.append(np.full(of_row.shape[1], index, np.intp))
    numel, a_in, b_in = np.concatenate(counts, axis=1)
    return by_strata(numel, a_in, b_in, owner=np.concatenate(owner), tensors=len(rows))


def _check_strata(mask: UpdateMask, name: str) -> None:
    """A file may state anything: what contradicts itself is not a smaller test, but an error."""
    info, strata = mask.info(name), mask.strata(name)
    if strata is None:
        return
    population, members = strata
    fits = population.shape == members.shape and bool(
        ((members >= 0) & (members <= population)).all()
    )
    if not fits or (population.sum(), members.sum()) != (info.numel, info.entries):
        raise CheckpointError(
            f"the mask of {safe(mask.origin.what)} contradicts itself: the counts by exponent of "
            f"{safe(name)} do not add up to its {info.entries:,} of {info.numel:,} entries; "
            "make the mask again"
        )


def _same_population(masks: Masks, name: str) -> bool:
    a, b = masks.a.strata(name), masks.b.strata(name)
    return a is not None and b is not None and np.array_equal(a.population, b.population)


def _marginal_products(masks: Masks, name: str) -> tuple[int, int] | None:
    """Sums of (entries in a) · (entries in b) over the rows and over the columns of a tensor."""
    tensor = masks.a.info(name)
    if len(tensor.shape) < 2 or not tensor.numel:
        return None
    height, width = tensor.shape[0], tensor.numel // tensor.shape[0]
    if 1 in (height, width):  # keeping how full each column of one row is keeps every bit
        return None
    (rows_a, columns_a), (rows_b, columns_b) = (
        marginals(mask, name) for mask in (masks.a, masks.b)
    )
    return int(rows_a @ rows_b), int(columns_a @ columns_b)
