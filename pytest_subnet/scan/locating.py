"""Where a tensor first differs, for messages: read again only when a gate has failed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from pytest_subnet.checkpoints.dtypes import ARITHMETIC, DTYPES
from pytest_subnet.checkpoints.files import FileReader
from pytest_subnet.scan.casts import cast_array
from pytest_subnet.scan.reading import Sides
from pytest_subnet.scan.units import cut

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from pytest_subnet.checkpoints.base import Buffer
    from pytest_subnet.pairs import ModelPair


@dataclass(frozen=True, slots=True)
class Difference:
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
                word = slice(entry * itemsize, (entry + 1) * itemsize)
                place = np.unravel_index(unit.segments[0].start + entry, tensor.shape)
                return Difference(
                    tuple(int(part) for part in place),
                    *_spell(base[word].copy(), tuned[word].copy(), tensor.dtype),
                )
    return None


def _on_cpu(buffer: Buffer) -> NDArray[np.uint8]:
    return buffer if isinstance(buffer, np.ndarray) else buffer.cpu().numpy()


def _spell(base: NDArray[np.uint8], tuned: NDArray[np.uint8], dtype: str) -> tuple[str, str]:
    """Two words that differ, so that one sees that they do: as values, else as bits."""
    if dtype in ARITHMETIC:
        digits = 17 if dtype == "float64" else 9
        values = (cast_array(word, dtype, "float64").view(np.float64)[0] for word in (base, tuned))
        before, after = (f"{value:.{digits}g}" for value in values)
        if before != after:
            return before, after
    return f"0x{base[::-1].tobytes().hex()}", f"0x{tuned[::-1].tobytes().hex()}"
