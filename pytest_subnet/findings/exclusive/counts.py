"""Several masks, and the steps of a run, counted together a piece of bits at a time."""

from __future__ import annotations

import glob
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from pytest_subnet.errors import PairMismatchError, SelectionError
from pytest_subnet.findings.common.result import measure
from pytest_subnet.findings.exclusive.result import SharedTensor
from pytest_subnet.masks.algebra import check_same_tensors
from pytest_subnet.masks.bits import popcount
from pytest_subnet.masks.building import update_mask
from pytest_subnet.masks.update_mask import UpdateMask
from pytest_subnet.pairs.opening import open_pair
from pytest_subnet.scan.tolerance import SAME_BITS
from pytest_subnet.text import nearest, plural, safe
from pytest_subnet.trajectories.selection import select_everywhere

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from pytest_subnet.pairs import ModelPair
    from pytest_subnet.pairs.model_pair import TensorPair
    from pytest_subnet.pairs.selection import Patterns
    from pytest_subnet.trajectories import Trajectory

    Words = NDArray[np.uint64]


class Named(NamedTuple):
    """Masks and how messages call them; names are not escaped."""

    names: tuple[str, ...]
    masks: tuple[UpdateMask, ...]


def named(masks: object) -> Named:
    """The masks of a mapping or a sequence, in order.

    Raises:
        TypeError: it is neither, or holds something else.
        SelectionError: a mask is empty, or given twice.
        PairMismatchError: they cover other tensors.
    """
    if isinstance(masks, UpdateMask) or not isinstance(masks, Mapping | Sequence):
        raise TypeError(
            f"masks is {safe(type(masks).__name__)}; a mapping or a sequence of UpdateMasks is "
            "needed"
        )
    if isinstance(masks, Mapping):
        names = tuple(str(name) for name in masks)
        found = tuple(masks.values())
    else:
        names = tuple(f"mask {number}" for number in range(1, len(masks) + 1))
        found = tuple(masks)
    for name, mask in zip(names, found, strict=True):
        if not isinstance(mask, UpdateMask):
            raise TypeError(
                f"{safe(name)} is {safe(type(mask).__name__)}, not an UpdateMask; load it with "
                ".load(), or make one with UpdateMask.of"
            )
    for number, mask in enumerate(found):
        if number:
            check_same_tensors(found[0], mask)
        for earlier in range(number):
            if mask is found[earlier] or (mask and mask.is_same(found[earlier])):
                raise SelectionError(
                    f"{safe(names[earlier])} and {safe(names[number])} are the same mask, given "
                    "twice"
                )
    return Named(names, found)


def check_none_empty(given: Named) -> None:
    """Raise `SelectionError` where a mask has no entry."""
    for name, mask in zip(*given, strict=True):
        if not mask:
            raise SelectionError(
                f"{safe(name)} is empty, and shares nothing with any mask; leave it out"
            )


def count_shared(masks: Sequence[UpdateMask]) -> tuple[list[SharedTensor], list[int]]:
    """What masks of the same tensors share; and of each, entries that none before it holds.

    One running union, a piece at a time.
    """
    tensors = []
    first = [0] * len(masks)
    for tensor in masks[0].tensors:
        union = shared = 0
        for pieces in zip(*(mask.words(tensor.name) for mask in masks), strict=True):
            seen, twice = np.zeros_like(pieces[0]), np.zeros_like(pieces[0])
            for number, words in enumerate(pieces):
                twice |= seen & words
                first[number] += popcount(words & ~seen)
                seen |= words
            union += popcount(seen)
            shared += popcount(twice)
        assigned = sum(mask.info(tensor.name).entries for mask in masks)
        tensors.append(
            SharedTensor(
                tensor.name, tensor.shape, tensor.dtype, tensor.numel, assigned, union, shared
            )
        )
    return tensors, first


def count_pairs(masks: Sequence[UpdateMask]) -> NDArray[np.int64]:
    """Int64 `[T, T]`: how many entries each two masks share; only to explain a failure."""
    counts = np.zeros((len(masks), len(masks)), np.int64)
    for name in masks[0].names():
        for pieces in zip(*(mask.words(name) for mask in masks), strict=True):
            for one, words in enumerate(pieces):
                for other in range(one):
                    counts[one, other] += popcount(words & pieces[other])
    return counts + counts.T


def differing(one: UpdateMask, other: UpdateMask) -> int:
    """How many entries only one of two masks of the same tensors holds."""
    check_same_tensors(one, other)
    return sum(
        popcount(here ^ there)
        for name in one.names()
        for here, there in zip(one.words(name), other.words(name), strict=True)
    )


class Stepped(NamedTuple):
    """What one step moved of one tensor.

    Attributes:
        tensor: as the first checkpoint has it.
        moved: entries with other bits.
        outside: of these, outside the mask of the step.
        earlier: of those moved, in a mask of an earlier step.
    """

    tensor: TensorPair
    moved: int
    outside: int
    earlier: int


def count_steps(
    trajectory: Trajectory,
    masks: Sequence[UpdateMask],
    include: Patterns | None,
    exclude: Patterns | None,
) -> Iterator[tuple[int, list[Stepped]]]:
    """What each step moved of each tensor selected, against the masks; the scan finds the bits.

    Yields:
        Of each step, the entries of its mask that no earlier one holds, and the counts.

    Raises:
        SelectionError: a pattern matches nothing, or nothing that the masks name is selected.
        PairMismatchError: a tensor does not align, or the masks name one that is not there.
    """
    selection = select_everywhere(trajectory, include, exclude)
    first = trajectory.pairs[0]
    chosen = [first.tensors[row] for row in (*selection.rows, *selection.apart)]
    mask_names = _mask_names(masks[0], first, {each.name for each in chosen})
    union: UpdateMask | None = None
    for number, mask in enumerate(masks):
        pair = _step(trajectory, number)
        rows = _rows(trajectory, number, pair, chosen)
        weights = [glob.escape(pair.tensors[row].name) for row in rows if _is_weight(pair, row)]
        bits = update_mask(pair, include=weights) if weights else None
        step = []
        for tensor, row in zip(chosen, rows, strict=True):
            stepped = pair.tensors[row].name
            if bits is not None and _is_weight(pair, row):
                name = mask_names.get(tensor.name)
                step.append(_counted(tensor, bits.words(stepped), name, mask, union))
            else:  # buffers and integer tensors: no mask speaks of them
                (movement,) = measure(pair, [row], SAME_BITS)
                step.append(Stepped(tensor, movement.changed, movement.changed, 0))
        yield (mask if union is None else mask - union).count, step
        union = mask if union is None else union | mask


def _counted(
    tensor: TensorPair,
    bits: Iterator[Words],
    name: str | None,
    mask: UpdateMask,
    union: UpdateMask | None,
) -> Stepped:
    if name is None:
        moved = sum(popcount(words) for words in bits)
        return Stepped(tensor, moved, moved, 0)
    moved = outside = earlier = 0
    before = None if union is None else union.words(name)
    for words, inside in zip(bits, mask.words(name), strict=True):
        moved += popcount(words)
        outside += popcount(words & ~inside)
        earlier += 0 if before is None else popcount(words & next(before))
    return Stepped(tensor, moved, outside, earlier)


def _step(trajectory: Trajectory, number: int) -> ModelPair:
    """The pair of one checkpoint with the next; that of the first two is there already."""
    if number == 0:
        return trajectory.pairs[0]
    return open_pair(trajectory.checkpoints[number], trajectory.checkpoints[number + 1])


def _rows(
    trajectory: Trajectory, number: int, pair: ModelPair, chosen: Sequence[TensorPair]
) -> list[int]:
    """The rows in `pair`, of step `number`, of the tensors `chosen` in the first one."""
    if number == 0:
        stored = {each.name: each.base_name for each in pair.tensors}
    else:
        stored = {each.name: each.tuned_name for each in trajectory.pairs[number - 1].tensors}
    row_of = {each.base_name: row for row, each in enumerate(pair.tensors)}
    lost = [each.name for each in chosen if stored[each.name] not in row_of]
    if lost:
        raise PairMismatchError(
            f"{pair.label} does not compare {plural(len(lost), 'tensor')} that the first step "
            f"does, {safe(lost[0])} first; save all checkpoints alike, or leave it out with "
            "exclude=",
            pair.problems,
        )
    return [row_of[stored[each.name]] for each in chosen]


def _is_weight(pair: ModelPair, row: int) -> bool:
    return pair.tensors[row].is_weight


def _mask_names(mask: UpdateMask, pair: ModelPair, chosen: set[str]) -> dict[str, str]:
    """What the masks call each tensor that is selected."""
    shapes = {each.name: each.shape for each in pair.tensors}
    found: dict[str, str] = {}
    for each in mask.tensors:
        name = pair.tied.get(each.name, each.name)
        if name not in shapes:
            raise PairMismatchError(
                f"the masks name {safe(each.name)}, which the run does not have"
                f"{nearest(each.name, shapes)}; make them from checkpoints of this model"
            )
        if shapes[name] != each.shape:
            raise PairMismatchError(
                f"the masks have shape {list(each.shape)} for {safe(each.name)}, the run "
                f"{list(shapes[name])}; make them from checkpoints of this model"
            )
        if name in found:
            raise PairMismatchError(
                f"{safe(found[name])} and {safe(each.name)} are one tensor in the run; leave one "
                "of them out of the masks"
            )
        found[name] = each.name
    if not chosen & found.keys():
        raise SelectionError(
            "nothing is selected that the masks name; leave include= and exclude= out, or choose "
            "other tensors with them"
        )
    return found
