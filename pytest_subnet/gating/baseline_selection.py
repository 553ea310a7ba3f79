"""Which tensors a result is of, in one line: what tells two selections of equal size apart."""

from __future__ import annotations

import re
from collections import defaultdict
from typing import TYPE_CHECKING

import xxhash

from pytest_subnet.text import first_few

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

_NUMBER = re.compile(r"(?<=\.)\d{1,9}(?=\.)")


def selection(result: object) -> str | None:
    """The tensors of a result, or None for a result that has none.

    Taken from the names and not from the patterns that found them: the same tensors are the same
    selection, however they were asked for. Where the names are too many to show, or their numbers
    too many to say apart, the digest of all of them still differs.

    >>> from types import SimpleNamespace as Row
    >>> rows = [Row(name=f"layers.{layer}.up_proj.weight") for layer in range(24)]
    >>> selection(Row(per_tensor=rows))
    'layers.0-23.up_proj.weight (0d420979)'
    """
    rows = getattr(result, "per_tensor", None)
    if not isinstance(rows, list | tuple):
        return None
    names = sorted({name for row in rows if isinstance(name := getattr(row, "name", None), str)})
    if not names:
        return None
    digest = xxhash.xxh3_64_hexdigest("\0".join(names).encode("utf-8", "surrogatepass"))
    return f"{first_few(list(_gathered(names)))} ({digest[:8]})"


def _gathered(names: Iterable[str]) -> Iterator[str]:
    """The names, those that differ in numbers only as one: `layers.0-23.up_proj.weight`."""
    alike: dict[tuple[str, int], list[tuple[int, ...]]] = defaultdict(list)
    for name in names:
        numbers = tuple(map(int, _NUMBER.findall(name)))
        alike[_NUMBER.sub("\0", name), len(numbers)].append(numbers)
    for (pattern, _), members in alike.items():
        start, *rest = pattern.split("\0")
        ranges = [*map(_ranges, zip(*members, strict=True))]
        # A name may hold the mark itself; what is shown of it is then cut, and its digest is whole.
        yield start + "".join(map("".join, zip(ranges, rest, strict=False)))


def _ranges(numbers: Iterable[int]) -> str:
    """Numbers in order, runs of them as one: `0-3,7`."""
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(f"{low}" if low == high else f"{low}-{high}" for low, high in runs)
