"""Boxes in a tensor: whether they cover it, and where their bytes lie in its row order.

A sharded tensor is stored as boxes, each packed in row order. A box cut along the first dimension
is one run of the tensor's bytes; any other is many short runs at equal distances.
"""

from __future__ import annotations

import math
from itertools import accumulate
from operator import mul
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    Shape = tuple[int, ...]


class Box(NamedTuple):
    """A part of a tensor: where it starts in each dimension, and how far it goes."""

    offsets: Shape
    sizes: Shape


class Runs(NamedTuple):
    """Runs of bytes that are packed in a box and lie at equal distances in the tensor.

    Attributes:
        target: the first byte of the first run in the tensor.
        source: the same byte in the box.
        nbytes: of one run.
        count: how many there are.
        step: from the start of one to the start of the next in the tensor.
    """

    target: int
    source: int
    nbytes: int
    count: int = 1  # type: ignore[assignment]  # hides tuple.count, which no one calls here
    step: int = 0

    @property
    def size(self) -> int:
        """Bytes of all of them."""
        return self.nbytes * self.count


def strides_of(shape: Sequence[int]) -> Shape:
    """How far apart neighbours in each dimension are in row order.

    >>> strides_of((2, 3, 4))
    (12, 4, 1)
    """
    return tuple(accumulate(reversed(shape[1:]), mul, initial=1))[::-1] if shape else ()


def fault_in_cover(shape: Shape, boxes: Sequence[Box]) -> str | None:
    """What is wrong with `boxes` as a partition of a tensor; None when each entry is in one.

    >>> fault_in_cover((4, 2), [Box((0, 0), (2, 2)), Box((3, 0), (1, 2))])
    'they hold 6 of its 8 entries'
    """
    for box in boxes:
        ends = [offset + size for offset, size in zip(box.offsets, box.sizes, strict=True)]
        if any(end > size for end, size in zip(ends, shape, strict=True)):
            return f"the one at {list(box.offsets)} reaches to {ends}"
    if len(boxes) > 1:
        # Along the dimension with the most cuts, only a few boxes are open at a time.
        sweep = max(range(len(shape)), key=lambda dim: len({box.offsets[dim] for box in boxes}))
        still_open: list[Box] = []
        for box in sorted(boxes, key=lambda box: box.offsets[sweep]):
            start = box.offsets[sweep]
            still_open = [
                each for each in still_open if each.offsets[sweep] + each.sizes[sweep] > start
            ]
            for each in still_open:
                if _overlap(each, box):
                    return f"those at {list(each.offsets)} and {list(box.offsets)} overlap"
            still_open.append(box)
    there, held = math.prod(shape), sum(math.prod(box.sizes) for box in boxes)
    return None if held == there else f"they hold {held:,} of its {there:,} entries"


def _overlap(one: Box, other: Box) -> bool:
    return all(
        a < b + b_size and b < a + a_size for a, a_size, b, b_size in zip(*one, *other, strict=True)
    )


def start_of_run(box: Box, shape: Shape) -> int | None:
    """Where in the tensor a box starts that is one run of it; None when it is several.

    >>> start_of_run(Box((2, 0), (1, 4)), (3, 4)), start_of_run(Box((0, 2), (3, 2)), (3, 4))
    (8, None)
    """
    if any(size != 1 for size in box.sizes[: _last_cut(box, shape)]):
        return None
    return sum(offset * step for offset, step in zip(box.offsets, strides_of(shape), strict=True))


def runs_between(box: Box, shape: Shape, start: int, stop: int) -> Iterator[Runs]:
    """What a box holds of the entries `start` to `stop` of a tensor, in row order.

    >>> list(runs_between(Box((0, 2), (3, 2)), (3, 4), 4, 12))
    [Runs(target=6, source=2, nbytes=2, count=2, step=4)]
    """
    cut = _last_cut(box, shape)
    there, here = strides_of(shape), strides_of(box.sizes)
    length = box.sizes[cut] * there[cut]

    def within(dim: int, target: int, source: int) -> Iterator[Runs]:
        target += box.offsets[dim] * there[dim]
        if dim == cut:
            yield from _clipped(target, source, length, start, stop)
        elif dim == cut - 1:
            target += box.offsets[cut] * there[cut]
            yield from _rows(target, source, length, box.sizes[dim], there[dim], start, stop)
        else:
            step = there[dim]
            first = max(0, (start - target) // step)
            last = min(box.sizes[dim], -(-(stop - target) // step))
            for i in range(first, last):
                yield from within(dim + 1, target + i * step, source + i * here[dim])

    return within(0, 0, 0)


def _rows(
    target: int, source: int, length: int, count: int, step: int, start: int, stop: int
) -> Iterator[Runs]:
    """Those of `count` runs that lie between `start` and `stop`, the first and last cut there."""
    first = max(0, (start - target - length) // step + 1)
    last = min(count, -(-(stop - target) // step))
    if first < last and target + first * step < start:
        yield from _clipped(target + first * step, source + first * length, length, start, stop)
        first += 1
    tail = last
    if first < last and target + (last - 1) * step + length > stop:
        tail -= 1
    if first < tail:
        yield Runs(target + first * step, source + first * length, length, tail - first, step)
    if tail < last:
        yield from _clipped(target + tail * step, source + tail * length, length, start, stop)


def _clipped(target: int, source: int, length: int, start: int, stop: int) -> Iterator[Runs]:
    skipped = max(0, start - target)
    nbytes = min(target + length, stop) - target - skipped
    if nbytes > 0:
        yield Runs(target + skipped, source + skipped, nbytes)


def _last_cut(box: Box, shape: Shape) -> int:
    """The last dimension in which a box is not whole, or the first one."""
    return max((dim for dim, size in enumerate(box.sizes) if size != shape[dim]), default=0)
