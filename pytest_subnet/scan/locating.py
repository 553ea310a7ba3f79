"""Where a tensor first differs, for messages: read again only when a gate has failed."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from pytest_subnet.checkpoints.dtypes import ARITHMETIC, DTYPES
from pytest_subnet.checkpoints.files import FileReader
from pytest_subnet.scan.casts import cast
from pytest_subnet.scan.reading import Sides
from pytest_subnet.scan.units import cut

if TYPE_CHECKING:
    from pytest_subnet.checkpoints.base import Buffer
    from pytest_subnet.pairs import ModelPair


class Difference(NamedTuple):
    """The first entry of a tensor that has other bits.

    Attributes:
        index: its place in the tensor.
        base: what the base stores there, as text.
        tuned: what the tuned checkpoint stores there.
    """

    index: tuple[int, ...]
    base: str
    tuned: str

    def __str__(self) -> str:
        """As messages show it."""
        return f"[{', '.join(map(str, self.index))}] {self.base} -> {self.tuned}"


def first_difference(pair: ModelPair, row: int) -> Difference | None:
    """The first entry of tensor `row` of `pair` whose bits differ; None when none does."""
    tensor = pair.tensors[row]
    itemsize = DTYPES[tensor.dtype].itemsize
    with FileReader() as reader:
        sides = Sides(reader, pair.base, pair.tuned)
        for unit in cut(pair, [row]):
            base, tuned = (_on_cpu(side) for side in sides.load(unit))
            differs = np.flatnonzero(base != tuned)
            if differs.size:
                entry = int(differs[0]) // itemsize
                part = slice(entry * itemsize, (entry + 1) * itemsize)
                place = np.unravel_index(unit.segments[0].start + entry, tensor.shape)
                return Difference(
                    tuple(int(part) for part in place),
                    _spell(base[part].copy(), tensor.dtype),
                    _spell(tuned[part].copy(), tensor.dtype),
                )
    return None


def _on_cpu(buffer: Buffer) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
    return buffer if isinstance(buffer, np.ndarray) else buffer.cpu().numpy()


def _spell(word: np.ndarray[tuple[int], np.dtype[np.uint8]], dtype: str) -> str:
    if dtype not in ARITHMETIC:
        return f"0x{word[::-1].tobytes().hex()}"
    value = cast(word, dtype, "float64").view(np.float64)[0]
    return f"{value:.8g}"
