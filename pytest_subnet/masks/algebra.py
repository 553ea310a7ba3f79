"""Masks as sets: bits are combined a piece at a time, never a whole model's at once."""

from __future__ import annotations

from itertools import chain
from typing import TYPE_CHECKING

import numpy as np

from pytest_subnet.errors import PairMismatchError
from pytest_subnet.masks.bits import packed_bytes, popcount, room_for_bits
from pytest_subnet.masks.update_mask import MaskTensor, Origin, Strata, UpdateMask
from pytest_subnet.text import safe

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from numpy.typing import NDArray

    Words = NDArray[np.uint64]

_LONGEST = 200


def combined(left: UpdateMask, right: UpdateMask, operator: str) -> UpdateMask:
    """Both masks as sets, `&`, `|` or `-`; tensors in the order of the left one."""
    check_same_tensors(left, right)
    operate = _OPERATORS[operator]

    def words(name: str) -> Iterator[Words]:
        for here, there in zip(left.words(name), right.words(name), strict=True):
            yield operate(here, there)

    one, other = left.origin, right.origin  # not the masks: their bits need not live on

    def base() -> str:
        return one.base if one.base == other.base else ""

    tolerance = one.tolerance if one.tolerance == other.tolerance else ""
    origin = Origin(_short(f"({one.what} {operator} {other.what})"), tolerance, base)
    tensors = [
        (each.name, each.shape, _dtype(each, right.info(each.name))) for each in left.tensors
    ]
    return from_words(tensors, words, origin)


def inverted(mask: UpdateMask) -> UpdateMask:
    """The entries of the same tensors that are not in `mask`."""

    def words(name: str) -> Iterator[Words]:
        numel, done = mask.info(name).numel, 0
        for run in mask.words(name):
            rest = ~run
            done += 64 * run.size
            if done > numel:  # padding stays zero
                rest[-1] &= np.uint64((1 << 64 - (done - numel)) - 1)
            yield rest

    strata = {}
    for name in mask.names():
        known = mask.strata(name)
        if known is not None:
            strata[name] = Strata(known.population, known.population - known.members)
    origin = mask.origin
    tensors = [(each.name, each.shape, each.dtype) for each in mask.tensors]
    return from_words(
        tensors,
        words,
        Origin(_short(f"~({origin.what})"), origin.tolerance, lambda: origin.base),
        strata,
    )


def from_words(
    tensors: Sequence[tuple[str, tuple[int, ...], str]],
    words: Callable[[str], Iterator[Words]],
    origin: Origin,
    strata: Mapping[str, Strata] | None = None,
) -> UpdateMask:
    """A mask from the words of each tensor, made one tensor after the other.

    Args:
        tensors: name, shape and dtype of each.
        words: gives the bits of a tensor, padded with zeros, in runs of any length.
        origin: as for `UpdateMask`.
        strata: as for `UpdateMask`.
    """
    empty = [MaskTensor(*each, 0) for each in tensors]
    store = room_for_bits(sum(packed_bytes(each.numel) for each in empty))
    at = 0
    filled = []
    for tensor in empty:
        entries = 0
        for run in words(tensor.name):
            store.write(at, run.view(np.uint8))
            at += run.nbytes
            entries += popcount(run)
        filled.append(tensor._replace(entries=entries))
    return UpdateMask(filled, store, origin, strata)


def check_same_tensors(left: UpdateMask, right: UpdateMask) -> None:
    """Raise `PairMismatchError` unless both masks have the same names and shapes."""
    shapes = [{each.name: each.shape for each in mask.tensors} for mask in (left, right)]
    masks = f"the masks of {left.origin.what} and of {right.origin.what}"
    remedy = "make both from the same model, with the same include, exclude and kinds"
    for name in chain(*shapes):
        here, there = (shape.get(name) for shape in shapes)
        if here is None or there is None:
            side = "second" if here is None else "first"
            raise PairMismatchError(
                f"{masks} cover other tensors: only the {side} has {safe(name)}; {remedy}"
            )
        if here != there:
            raise PairMismatchError(
                f"{masks} differ in shape: {safe(name)} is {list(here)} in the first and "
                f"{list(there)} in the second; {remedy}"
            )


_OPERATORS: dict[str, Callable[[Words, Words], Words]] = {
    "&": lambda one, other: one & other,
    "|": lambda one, other: one | other,
    "-": lambda one, other: one & ~other,
}


def _dtype(one: MaskTensor, other: MaskTensor) -> str:
    return other.dtype if one.dtype == "bool" else one.dtype


def _short(what: str) -> str:
    return what if len(what) <= _LONGEST else f"{what[:_LONGEST]}…"
