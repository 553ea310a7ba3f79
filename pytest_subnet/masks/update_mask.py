"""A mask: a set of entries of a model, tensor by tensor, one bit an entry."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from pytest_subnet.errors import SelectionError
from pytest_subnet.masks.bits import PIECE_BYTES, MemoryBits, pack, packed_bytes, unpack
from pytest_subnet.text import nearest, safe

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from numpy.typing import ArrayLike, NDArray

    from pytest_subnet.masks.bits import BitStore


class MaskTensor(NamedTuple):
    """One tensor of a mask.

    Attributes:
        name: its name in the base.
        shape: of the tensor, and so of the mask.
        dtype: of the weights the mask was made from, as torch names it; `"bool"` where there were
            none.
        entries: how many entries are in the mask.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    entries: int

    @property
    def numel(self) -> int:
        """Number of entries of the tensor."""
        return math.prod(self.shape)

    @property
    def density(self) -> float:
        """Share of its entries that are in the mask."""
        return self.entries / self.numel


class Strata(NamedTuple):
    """Entries of one tensor by exponent of the base weight and whether its mantissa is zero.

    Stratum `2 * exponent + (mantissa == 0)`, with the exponent bits as they are stored (8 for
    bfloat16, 5 for float16).

    Attributes:
        population: int64 `[strata]`, all entries of the tensor.
        members: int64 `[strata]`, those in the mask.
    """

    population: NDArray[np.int64]
    members: NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Origin:
    """What a mask was made from.

    Attributes:
        what: in words, for messages: `"base -> tuned"`, `"the largest 10% of base"`; safe to print.
        tolerance: under which entries count as updated, as it is printed; empty for other masks.
        base: the fingerprint of the base; empty where there is none.
        tuned: the fingerprint of the tuned checkpoint, likewise.
    """

    what: str
    tolerance: str = ""
    base: str = ""
    tuned: str = ""


class UpdateMask:
    """A set of entries of a model: those that an update touched, or any others.

    Made from arrays by `UpdateMask.of`; never changed.

    Attributes:
        tensors: what it covers, as `MaskTensor`, in storage order.
        origin: what it was made from.

    >>> mask = UpdateMask.of({"weight": [[True, False], [True, True]]})
    >>> mask
    <UpdateMask given: 3 of 4 entries of 1 tensor (density 0.75)>
    >>> mask["weight"].tolist()
    [[True, False], [True, True]]
    """

    def __init__(
        self,
        tensors: Sequence[MaskTensor],
        store: BitStore,
        origin: Origin,
        strata: Mapping[str, Strata] | None = None,
    ) -> None:
        """Take bits as they are; the functions above make them.

        Args:
            tensors: in the order in which `store` keeps their bits.
            store: each tensor's bits, padded to whole words, one after the other.
            origin: what the mask was made from.
            strata: by name, for tensors whose base weights are known.
        """
        self.tensors = tuple(tensors)
        self.origin = origin
        self._store = store
        self._strata = dict(strata or {})
        starts = np.cumsum([0, *(packed_bytes(each.numel) for each in self.tensors)])
        self._places = {
            each.name: (int(start), each) for start, each in zip(starts, self.tensors, strict=False)
        }

    @classmethod
    def of(cls, entries: Mapping[str, ArrayLike], *, what: str = "given") -> UpdateMask:
        """A mask from boolean arrays by tensor name."""
        arrays = {name: np.asarray(array, np.bool_) for name, array in entries.items()}
        tensors = [
            MaskTensor(name, array.shape, "bool", int(np.count_nonzero(array)))
            for name, array in arrays.items()
        ]
        packed = [pack(array) for array in arrays.values()]
        return cls(
            tensors, MemoryBits(np.concatenate([np.empty(0, np.uint8), *packed])), Origin(what)
        )

    def names(self) -> list[str]:
        """The names of its tensors."""
        return [each.name for each in self.tensors]

    def info(self, name: str) -> MaskTensor:
        """What is known of the tensor `name`; `SelectionError` when the mask has no such tensor."""
        return self._place(name)[1]

    @property
    def count(self) -> int:
        """How many entries are in the mask."""
        return sum(each.entries for each in self.tensors)

    @property
    def numel(self) -> int:
        """How many entries its tensors have."""
        return sum(each.numel for each in self.tensors)

    @property
    def density(self) -> float:
        """Share of the entries that are in the mask."""
        return self.count / self.numel

    def strata(self, name: str) -> Strata | None:
        """Counts by exponent of the base weight; None where the base is unknown or not 16-bit."""
        return self._strata.get(name)

    def words(self, name: str) -> Iterator[NDArray[np.uint64]]:
        """The bits of one tensor in runs of up to 1 MB, padding (zeros) included."""
        start, tensor = self._place(name)
        end = start + packed_bytes(tensor.numel)
        for at in range(start, end, PIECE_BYTES):
            yield self._store.read(at, min(PIECE_BYTES, end - at)).view(np.uint64)

    def __getitem__(self, name: str) -> NDArray[np.bool_]:
        """One tensor's entries as booleans, in its shape."""
        start, tensor = self._place(name)
        packed = self._store.read(start, packed_bytes(tensor.numel))
        return unpack(packed, tensor.numel).reshape(tensor.shape)

    def _place(self, name: str) -> tuple[int, MaskTensor]:
        if name not in self._places:
            hint = nearest(name, self._places)
            raise SelectionError(f"the mask of {self.origin.what} has no tensor {safe(name)}{hint}")
        return self._places[name]

    def __repr__(self) -> str:
        """One line: what, how many."""
        tensors = f"{len(self.tensors):,} tensor{'s' if len(self.tensors) != 1 else ''}"
        return (
            f"<UpdateMask {self.origin.what}: {self.count:,} of {self.numel:,} entries of "
            f"{tensors} (density {self.density if self.numel else 0:.4g})>"
        )
