"""A mask: a set of entries of a model, tensor by tensor, one bit an entry."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, NoReturn

import numpy as np

from pytest_subnet.errors import CheckpointError, SelectionError
from pytest_subnet.masks.bits import (
    PIECE_BYTES,
    MemoryBits,
    pack,
    packed_bytes,
    popcount,
    unpack,
)
from pytest_subnet.masks.entries import as_entries, check_entries
from pytest_subnet.text import nearest, safe

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from numpy.typing import ArrayLike, NDArray

    from pytest_subnet.masks.bits import BitStore


class MaskTensor(NamedTuple):
    """One tensor of a mask.

    Attributes:
        name: its name in the base.
        shape: of the tensor, and so of the mask.
        dtype: of the weights the mask was made from, as torch names it: the 16-bit one to which
            their update was rounded, else the one compared; `"bool"` where there were none.
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
        """Share of its entries that are in the mask; NaN where it has none."""
        return self.entries / self.numel if self.numel else math.nan


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


class Origin:
    """What a mask was made from.

    A fingerprint reads a whole checkpoint, so it is taken when it is first asked for.

    Attributes:
        what: in words, for messages: `"base -> tuned"`, `"the largest 10% of base"`; safe to print.
        tolerance: under which entries count as updated, as it is printed; empty for other masks.
    """

    __slots__ = ("_base", "_tuned", "tolerance", "what")

    def __init__(
        self,
        what: str,
        tolerance: str = "",
        base: str | Callable[[], str] = "",
        tuned: str | Callable[[], str] = "",
    ) -> None:
        """Take fingerprints as they are, or as functions that take them."""
        self.what = what
        self.tolerance = tolerance
        self._base = base
        self._tuned = tuned

    @property
    def base(self) -> str:
        """The fingerprint of the base; empty where there is none.

        Raises:
            CheckpointError: the base has changed since, and its fingerprint was not taken before.
        """
        if callable(self._base):
            self._base = self._base()
        return self._base

    @property
    def tuned(self) -> str:
        """The fingerprint of the tuned checkpoint, likewise."""
        if callable(self._tuned):
            self._tuned = self._tuned()
        return self._tuned

    @property
    def known(self) -> tuple[str, str, str] | None:
        """Tolerance and both fingerprints; None where one is missing or was not taken yet."""
        if not isinstance(self._base, str) or not isinstance(self._tuned, str):
            return None
        all_of_it = self.tolerance, self._base, self._tuned
        return all_of_it if all(all_of_it) else None

    def __repr__(self) -> str:
        """What it was made from, without reading anything."""
        return f"Origin({self.what!r}, {self.tolerance!r})"


class UpdateMask:
    """A set of entries of a model: those that an update touched, or any others.

    Made by `update_mask`, `magnitude_mask`, `principal_mask` and `random_mask_like`, from arrays by
    `UpdateMask.of`, from a file by `UpdateMask.load`; never changed. `&`, `|`, `-` and `~` are as
    for sets; both sides must cover the same tensors.

    It is a mapping of tensors, and a set of entries: `in`, `len` and iteration are over the names
    of its tensors, `bool(mask)` says whether any entry is in it. `==` is identity, as comparing
    bits could read gigabytes: `not (a - b) and not (b - a)` compares them.

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
        *,
        from_file: str = "",
    ) -> None:
        """Take bits as they are; the functions named above make them.

        Args:
            tensors: in the order in which `store` keeps their bits.
            store: each tensor's bits, padded to whole words, one after the other.
            origin: what the mask was made from.
            strata: by name, for tensors whose base weights are known.
            from_file: the file that `store` reads, whose bits are counted when they are first read.
        """
        self.tensors = tuple(tensors)
        self.origin = origin
        self._file = from_file
        self._store = store
        self._strata = strata or {}
        self._unverified = {each.name for each in tensors} if from_file else set()
        starts = np.cumsum([0, *(packed_bytes(each.numel) for each in self.tensors)])
        self._places = {
            each.name: (int(start), each) for start, each in zip(starts, self.tensors, strict=False)
        }

    @classmethod
    def of(cls, entries: Mapping[str, ArrayLike], *, what: str = "given") -> UpdateMask:
        """A mask from boolean arrays by tensor name.

        Args:
            entries: bool arrays of any shape, or numbers of which each is 0 or 1; dense tensors of
                any dtype and device, with or without gradient, too.
            what: in words, for messages.

        Raises:
            SelectionError: there is no tensor.
            TypeError: no mapping, a name that is no text, or entries that are no numbers, sparse,
                quantised, without data or masked.
            ValueError: a number is neither 0 nor 1, or lists are ragged.
        """
        check_entries(entries)
        arrays = {name: as_entries(name, array) for name, array in entries.items()}
        tensors = [
            MaskTensor(name, array.shape, "bool", int(np.count_nonzero(array)))
            for name, array in arrays.items()
        ]
        packed = [np.empty(0, np.uint8), *(pack(array) for array in arrays.values())]
        return cls(tensors, MemoryBits(np.concatenate(packed)), Origin(safe(what)))

    def names(self) -> list[str]:
        """The names of its tensors."""
        return [each.name for each in self.tensors]

    def info(self, name: str) -> MaskTensor:
        """What is known of the tensor `name`; `SelectionError` when the mask has no such tensor."""
        return self._place(name)[1]

    def __contains__(self, name: object) -> bool:
        """Whether it covers a tensor of that name."""
        return isinstance(name, str) and name in self._places

    def __iter__(self) -> Iterator[str]:
        """The names of its tensors."""
        return iter(self._places)

    def __len__(self) -> int:
        """How many tensors it covers."""
        return len(self.tensors)

    def __bool__(self) -> bool:
        """Whether any entry is in it."""
        return any(each.entries for each in self.tensors)

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
        """Share of the entries that are in the mask; NaN where there are none."""
        return self.count / self.numel if self.numel else math.nan

    def strata(self, name: str) -> Strata | None:
        """Counts by exponent of the base weight; None where the base is unknown or not 16-bit."""
        known = self._strata.get(name)
        for counts in known or ():
            counts.flags.writeable = False  # they may be the mask's own
        return known

    def words(self, name: str) -> Iterator[NDArray[np.uint64]]:
        """The bits of one tensor in runs of up to 1 MB, padding (zeros) included; read-only."""
        start, tensor = self._place(name)
        end = start + packed_bytes(tensor.numel)
        check = Recount(self._file, tensor) if name in self._unverified else None
        for at in range(start, end, PIECE_BYTES):
            words = self._store.read(at, min(PIECE_BYTES, end - at)).view(np.uint64)
            words.flags.writeable = False  # they may be the mask's own
            if check is not None:
                check.add(words, is_last=at + PIECE_BYTES >= end)
            yield words
        self._unverified.discard(name)

    def __getitem__(self, name: str) -> NDArray[np.bool_]:
        """One tensor's entries as booleans, in its shape."""
        tensor = self.info(name)
        packed = [words.view(np.uint8) for words in self.words(name)]
        bits = np.concatenate([np.empty(0, np.uint8), *packed])
        return unpack(bits, tensor.numel).reshape(tensor.shape)

    def __and__(self, other: UpdateMask) -> UpdateMask:
        """The entries that are in both masks."""
        from pytest_subnet.masks.algebra import combined

        return combined(self, other, "&") if _is_mask(other) else NotImplemented

    def __or__(self, other: UpdateMask) -> UpdateMask:
        """The entries that are in at least one of the masks."""
        from pytest_subnet.masks.algebra import combined

        return combined(self, other, "|") if _is_mask(other) else NotImplemented

    def __sub__(self, other: UpdateMask) -> UpdateMask:
        """The entries that are in this mask and not in the other."""
        from pytest_subnet.masks.algebra import combined

        return combined(self, other, "-") if _is_mask(other) else NotImplemented

    def __invert__(self) -> UpdateMask:
        """The entries that are not in this mask."""
        from pytest_subnet.masks.algebra import inverted

        return inverted(self)

    def is_same(self, other: UpdateMask) -> bool:
        """Whether both are one mask, as far as can be told without reading bits or weights.

        They are when their bits are the same object or lie in the same file, or when both are the
        update between two checkpoints of the same fingerprints, taken before, under the same
        tolerance. Two that merely hold the same entries are not.

        >>> mask = UpdateMask.of({"weight": [True, False]})
        >>> mask.is_same(mask), mask.is_same(UpdateMask.of({"weight": [True, False]}))
        (True, False)
        """
        if set(self.tensors) != set(other.tensors):
            return False
        if self._store is other._store or self._store == other._store:
            return True
        return self.origin.known is not None and self.origin.known == other.origin.known

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the mask to `path`, a safetensors file; whole, or not at all.

        The fingerprints of the checkpoints go with it, so that a later mask is compared with this
        one only if both have the same base; taking them reads both checkpoints once.

        Args:
            path: where to write; a file that is there is replaced. A mask that was loaded from it
                is read from the new file from then on; others that were must be loaded again.

        Raises:
            CheckpointError: it cannot be written, or the checkpoints have changed since.
        """
        from pytest_subnet.masks.saving import save

        save(self, path)
        if self._file and _is_file(self._file, path):
            again = self.load(self._file)
            self._store, self._strata = again._store, again._strata

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> UpdateMask:
        """The mask that `save` wrote to `path`; the header is read now, bits when they are needed.

        Raises:
            CheckpointError: there is no such file, or it is damaged or no mask.
        """
        from pytest_subnet.masks.loading import load

        return load(path)

    def _place(self, name: str) -> tuple[int, MaskTensor]:
        if not isinstance(name, str):
            raise TypeError(
                f"names of tensors are str, not {type(name).__name__}; names() lists them"
            )
        if name not in self._places:
            hint = nearest(name, self._places)
            raise SelectionError(f"the mask of {self.origin.what} has no tensor {safe(name)}{hint}")
        return self._places[name]

    def __repr__(self) -> str:
        """One line: what, how many."""
        tensors = f"{len(self.tensors):,} tensor{'s' if len(self.tensors) != 1 else ''}"
        return (
            f"<UpdateMask {self.origin.what}: {self.count:,} of {self.numel:,} entries of "
            f"{tensors} (density {self.density:.4g})>"
        )


class Recount:
    """Holds bits that are read to what the header of their file says of them."""

    def __init__(self, path: str, tensor: MaskTensor) -> None:
        """Nothing counted yet of `tensor`."""
        self._path = path
        self._tensor = tensor
        self._left = tensor.entries

    def add(self, words: NDArray[np.uint64], *, is_last: bool) -> None:
        """Count a run of words; `CheckpointError` when they are not what the header says."""
        self._left -= popcount(words)
        used = self._tensor.numel % 64
        if is_last and used and int(words[-1]) >> used:
            self._fail("bits beyond its last entry are set")
        if is_last and self._left:
            found = self._tensor.entries - self._left
            self._fail(f"{found:,} bits are set, its header says {self._tensor.entries:,}")

    def _fail(self, what: str) -> NoReturn:
        raise CheckpointError(
            f"{safe(self._path)} is corrupt: of {safe(self._tensor.name)} {what}; "
            "save the mask again, or copy the file again"
        )


def _is_file(one: str, other: str | os.PathLike[str]) -> bool:
    try:
        return Path(one).samefile(other)
    except OSError:  # the one that was loaded has gone
        return False


def _is_mask(other: object) -> bool:
    return isinstance(other, UpdateMask)
